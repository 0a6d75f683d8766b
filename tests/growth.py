"""Whether a reader's time grows with its text and not with the square of it, without a bound in seconds."""

import time
from collections.abc import Callable

_SMALL, _TIMES = 30_000, 8  # characters, and how many times as many the long text has
_ATTEMPTS = 5


def is_linear(read: Callable[[str], object], piece: str) -> bool:
    """True where eight times the text takes less than 24 times the CPU time; were it quadratic, it would take 64.

    Machines stutter, so that the best of each of up to five rounds counts; every text differs from those before it,
    so that no cache answers for it.
    """
    best = [float("inf"), float("inf")]
    for attempt in range(_ATTEMPTS):
        for i, size in enumerate((_SMALL, _SMALL * _TIMES)):
            text = " " * attempt + piece * (size // len(piece))
            started = time.process_time()
            read(text)
            best[i] = min(best[i], time.process_time() - started)
        if best[1] < 3 * _TIMES * best[0]:
            return True
    return False
