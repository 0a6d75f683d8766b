"""Answers as values, read from LaTeX and compared; imports nothing of sva, for `math_worker.py` runs it on its own."""
