"""Singular-value adaptation itself; knows no model, no task and no optimiser."""
