"""Where and how much an expert moved one spectrum."""

from typing import Any, NamedTuple

import numpy as np


class Movement(NamedTuple):
    """What z does to one weight W = U diag(s) V^T, W' - W = U diag(s (z - 1)) V^T."""

    mean_abs: float  # of z - 1
    max_abs: float  # of z - 1
    frobenius: float  # norm of W' - W relative to that of W
    spectral: float  # the same in the spectral norm: max abs(s (z - 1)) / s_max
    shares: tuple[float, float, float]  # of the squared Frobenius norm of W' - W: top, middle, bottom third of s


def movement(z: Any, s: Any) -> Movement:
    """How far z [R] moves the singular values s [R], computed in float64.

    Of a weight that is zero, and of a z that is all ones, nothing moves: the relative numbers and shares are 0.
    """
    z, s = np.asarray(z, np.float64), np.asarray(s, np.float64)
    moved, squares = np.abs(z - 1), (s * (z - 1)) ** 2
    total = squares.sum()
    shares = [float(part.sum() / total) if total else 0.0 for part in np.array_split(squares, 3)]
    norm, largest = np.linalg.norm(s), s.max(initial=0.0)
    return Movement(
        float(moved.mean()),
        float(moved.max()),
        float(np.sqrt(total) / norm) if norm else 0.0,
        float(np.sqrt(squares.max()) / largest) if largest else 0.0,
        (shares[0], shares[1], shares[2]),
    )
