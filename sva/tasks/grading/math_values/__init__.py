"""Answers as values, read from LaTeX and compared (`compare.same`).

`math_worker.py` imports this as a package of its own, so nothing of sva is imported here.
"""
