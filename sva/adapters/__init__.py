"""What is trained, as a protocol, and its members that need no decomposition: LoRA, DoRA, IA3, a dense change."""
