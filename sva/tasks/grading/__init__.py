"""From a completion to the answer in it, and whether that is right: numbers, options, expressions and programs.

What may take for ever (equality of expressions, reasoning-gym's scorers) runs in a process of its own (`worker`).
Programs run in `sva.sandbox`. A module here knows no task.
"""
