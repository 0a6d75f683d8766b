"""Experts, mixtures and checkpoints on the Hugging Face Hub: what is sent, its card, and the way back."""
