"""Macro view, micro view and self-adaptation on the same tasks and held-out prompts: one table and one picture."""
