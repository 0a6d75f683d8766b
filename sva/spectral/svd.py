"""Singular value decomposition of one weight, and how good it is."""

import numpy as np
import scipy.linalg

from sva.errors import UserError
from sva.spectral.forms import Spectrum


def svd(w: np.ndarray) -> Spectrum:
    """Thin SVD of w [D_out, D_in], computed in float64 on the host (LAPACK gesdd), returned as float32 arrays.

    Singular values are descending; R = min(D_out, D_in). The relative reconstruction error is that of rounding the
    factors to float32, about 1e-7 (Frobenius), also for rank-deficient weights.

    Raises:
      UserError: w holds NaN or infinite values.
    """
    w = np.asarray(w, np.float64)
    if not np.isfinite(w).all():
        raise UserError("the weight holds NaN or infinite values and cannot be decomposed")
    u, s, vt = scipy.linalg.svd(w, full_matrices=False, check_finite=False)
    return Spectrum(*(np.ascontiguousarray(x, np.float32) for x in (u, s, vt)))


def reconstruction_error(w: np.ndarray, spectrum: Spectrum) -> float:
    """Frobenius norm of W - U diag(s) V^T relative to that of W, computed in float64; 0 for a zero weight."""
    u, s, vt = (np.asarray(x, np.float64) for x in spectrum)
    norm = np.linalg.norm(w.astype(np.float64))
    return float(np.linalg.norm(w - (u * s) @ vt) / norm) if norm else 0.0
