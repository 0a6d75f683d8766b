"""The change that z makes to a weight as a product of two thin matrices, with its error."""

from typing import Any, NamedTuple

import numpy as np

from sva.spectral.forms import Spectrum


class LowRank(NamedTuple):
    """W' - W up to `error`: b a, of rank k."""

    b: np.ndarray  # [D_out, k] float32
    a: np.ndarray  # [k, D_in] float32
    error: float  # spectral norm of what is left out, relative to that of W


def low_rank(spectrum: Spectrum, z: Any, *, rank: int | None = None, tolerance: float = 0.0) -> LowRank:
    """W' - W = U diag(d) V^T, d = s (z - 1), on the components where abs(d) is largest.

    abs(d) is shared between the two factors by its square root, so that neither is small. The error is the largest
    abs(d) left out over s_max, exact up to rounding, for the components are orthogonal.

    Args:
      spectrum: u [D_out, R], s [R], vt [R, D_in].
      z: [R].
      rank: at most this many components; None for no limit.
      tolerance: leaves out components with abs(d) <= tolerance s_max; at 0 only those that do not move.
    """
    u, s, vt = (np.asarray(factor, np.float32) for factor in spectrum)
    d = s.astype(np.float64) * (np.asarray(z, np.float64) - 1)
    largest = float(s.max(initial=0.0))
    order = np.argsort(-np.abs(d), kind="stable")
    count = int((np.abs(d) > tolerance * largest).sum())
    count = count if rank is None else min(rank, count)
    keep, dropped = np.sort(order[:count]), np.abs(d[order[count:]])
    root = np.sqrt(np.abs(d[keep])).astype(np.float32)
    signed = root * np.sign(d[keep]).astype(np.float32)
    error = float(dropped.max(initial=0.0)) / largest if largest else 0.0
    return LowRank(u[:, keep] * signed[None, :], root[:, None] * vt[keep], error)
