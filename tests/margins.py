"""When two computations of the same tokens agree: the margin rule (DESIGN.md, section 10)."""

from collections.abc import Callable

import numpy as np

MARGIN = 1e-3  # between the two likeliest tokens: below it, rounding may choose either


def assert_same_tokens(
    ours: np.ndarray, theirs: np.ndarray, ids: np.ndarray, mask: np.ndarray, logits: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Greedy tokens [B, N] are equal up to each row's first step whose margin is under `MARGIN`.

    `logits` gives [V] for the token after ids [T].
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    for row in range(len(ours)):
        differing = np.flatnonzero(ours[row] != theirs[row])
        if differing.size:
            text = np.concatenate([ids[row][mask[row] > 0], ours[row][: differing[0]]])
            second, first = np.sort(logits(text))[-2:]
            assert first - second < MARGIN, f"row {row}, step {differing[0]}: margin {first - second}"
