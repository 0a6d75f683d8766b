"""The prompts and verdicts of Transformer-Squared's public code (SakanaAI/self-adaptive-llms, commit 03a41ae), faults
included.

For tables that must compare with the paper's; `sva.tasks.grading` is for everything else. Written anew from what that
code decides. Deviations: no text is ever evaluated, and every rule takes time linear in the completion.
"""
