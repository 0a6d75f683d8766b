"""Which rows a training step sees: a pure function of seed and step, through grain."""

from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=8)
def _shuffled(num_examples: int, seed: int) -> Any:
    import grain  # takes over a second

    return grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()


def drawn_indices(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Different row numbers of a step, drawn whatever other steps drew; all rows where there are no more.

    So does the public code of Transformer-Squared (commit 03a41ae), with the random numbers of torch. Deviation: ours
    are numpy's, and depend on seed and step alone.
    """
    rng = np.random.default_rng((seed, step))
    return rng.choice(num_examples, min(batch_size, num_examples), replace=False).tolist()


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` row numbers of a step (from 0); the same in every process, on every day.

    Each pass over the rows has an order of its own, and passes follow one another without a gap: every row
    comes once before any comes twice, whatever the batch size.
    """
    if num_examples < 1:
        raise ValueError(f"no rows to make batches of (num_examples = {num_examples})")
    rows = _shuffled(num_examples, seed)
    return [int(rows[step * batch_size + i]) for i in range(batch_size)]
