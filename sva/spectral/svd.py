"""Singular value decomposition of one weight, and how good it is."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.spectral.forms import Spectrum
from sva.utils.errors import UserError

# Each Gram matrix resolves the singular values down to this share of its largest: see `svd`.
RESOLVED = 1e-4
# Below this share of the largest, singular values are what float64 rounding left of a zero.
ZERO = 1e-12
# The short side from which on a GPU makes the first round of a decomposition; smaller ones were not tried.
ON_DEVICE = 1024
# Numbers in one float64 block of a weight: 32 MiB.
BLOCK = 1 << 22


def svd(w: np.ndarray) -> Spectrum:
    """Thin SVD of w [D_out, D_in], float32 host arrays, s descending, R = min(D_out, D_in).

    By the eigenvectors of the Gram matrix of the short side, in float64. For w [R, N] with W W^T = Q diag(s^2) Q^T:
    U = Q and V^T = diag(1/s) Q^T W; a tall w is decomposed as its transpose. What each step costs, eps = 1.1e-16:

    - U diag(s) V^T = Q Q^T W, so of the reconstruction only the rounding of Q and V to float32 is lost, about 5e-8
      relative (Frobenius), however ill-conditioned w is.
    - U is as orthonormal as LAPACK's syevd leaves it (1e-14), then rounded.
    - The product and syevd leave errors of a few eps s_max^2 in Q^T W W^T Q: a few eps s_max^2 / s_i in s_i, a few
      eps s_max^2 / (s_i s_j) in entry (i, j) of V^T V. Down to s_i = RESOLVED s_max (1e-4) the latter stays below 1e-7.
    - Components below that are not divided. Their rows of Q^T W lose what they hold of the finished rows of V^T (a
      few eps s_max / RESOLVED) and are decomposed in the same way, the largest of them being 1e-4 s_max at most; so on,
      until all are resolved or the rest is below ZERO s_max (1e-12). That rest gets s = 0 exactly and in V^T an
      orthonormal basis beside the finished rows. A well-conditioned w, as weights are, needs one round.

    Measured: relative error below 1e-7, max abs(U^T U - I) and max abs(V^T V - I) below 1e-6, s within 1e-7 s_max of
    LAPACK's float64, at any condition and rank (tests/test_svd.py; experiments/benchmarks/svd has times beside gesdd
    and torch.svd). Memory beside w: about 5 R^2 float64 numbers and the result. The same input gives the same bytes on
    one machine at one number of BLAS threads.

    On a GPU the first round of a matrix whose short side is ON_DEVICE or more is made there, in float64: on an H100
    4096 x 14336 takes 0.51 s, where sixteen cores take 6.2 s and torch.svd on the H100 1.3 s, with errors of 1e-3
    (experiments/benchmarks/svd, `device`). TPUs have no float64 eigenvectors, and a float32 Gram
    matrix misses the bounds: 1.2e-6 relative and 7e-6 in V^T V already for SmolLM2's first down_proj, whose s go down
    to 0.04 s_max only.

    Raises:
      UserError: w holds NaN or infinite values.
    """
    w = np.asarray(w)
    if w.shape[0] > w.shape[1]:
        q, s, long = _wide(w.T)
        return Spectrum(np.ascontiguousarray(long.T), s, np.ascontiguousarray(q.T, np.float32))
    q, s, long = _wide(w)
    return Spectrum(np.ascontiguousarray(q, np.float32), s, np.ascontiguousarray(long))


def truncate(spectrum: Spectrum, rank: int) -> tuple[Spectrum, np.ndarray]:
    """The first `rank` components, and the singular values [R - rank] that were dropped.

    The dropped part of w has the Frobenius norm sqrt(sum dropped^2) and the spectral norm dropped[0]. A truncated
    spectrum serves the delta form and merging: w + U_k diag(s (z - 1)) V_k^T, in which the dropped components keep 1.
    """
    u, s, vt = spectrum
    kept = Spectrum(np.ascontiguousarray(u[:, :rank]), s[:rank], np.ascontiguousarray(vt[:rank]))
    return kept, s[rank:]


def require_whole(spectra: Any) -> None:
    """Nothing, unless a spectrum of the tree is truncated: U diag(s z) V^T would lack the dropped part even at z = 1.

    Raises:
      UserError: one is truncated (named).
    """
    found = jax.tree_util.tree_leaves_with_path(spectra, is_leaf=lambda x: isinstance(x, Spectrum))
    for path, spectrum in found:
        if not isinstance(spectrum, Spectrum):
            continue
        u, s, vt = spectrum
        kept, full = s.shape[-1], min(u.shape[-2], vt.shape[-1])
        if kept < full:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"{name}: its spectrum keeps {kept} of {full} components, which serve the delta form and merging only; "
                "decompose without rank"
            )


def reconstruction_error(w: np.ndarray, spectrum: Spectrum) -> float:
    """Frobenius norm of W - U diag(s) V^T relative to that of W, computed in float64; 0 for a zero weight."""
    u, s, vt = spectrum
    if w.shape[0] > w.shape[1]:
        w, u, vt = w.T, vt.T, u.T
    us = u * s.astype(np.float64)
    wrong = total = 0.0
    for columns in _blocks(w):
        block = w[:, columns].astype(np.float64)
        total += np.vdot(block, block)
        block -= us @ vt[:, columns].astype(np.float64)
        wrong += np.vdot(block, block)
    return float(np.sqrt(wrong / total)) if total else 0.0


def orthogonality_errors(spectrum: Spectrum) -> tuple[float, float]:
    """(max abs(U^T U - I), max abs(V^T V - I)), computed in float64."""
    return _unlike_identity(spectrum.u.T), _unlike_identity(spectrum.vt)


def _unlike_identity(rows: np.ndarray) -> float:
    gram = _gram(rows)
    gram[np.diag_indices_from(gram)] -= 1
    return float(max(gram.max(), -gram.min()))


def _wide(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [R, R] float64, s [R] float32, long [R, N] float32) with w = q diag(s) long, for w [R, N], R <= N."""
    size = len(w)
    is_worth_it = jax.default_backend() == "gpu" and size >= ON_DEVICE
    q, s, long, done = _first_on_device(w) if is_worth_it else _first(w)
    largest = s[0] if size else 0.0
    while done < size:
        # In float64: what is left has rows of very different sizes, mixed again by each round.
        tail = np.empty((size - done, w.shape[1]))
        _rows_into(tail, q[:, done:], w)
        _take_out(tail, long[:done])
        p, found = _eigh(_gram(tail))
        q[:, done:] = q[:, done:] @ p
        s[done:] = found
        if found[0] <= ZERO * largest:
            s[done:] = 0
            long[done:] = _beside(long[:done], size - done)
            break
        more = _resolved(found)
        _rows_into(long[done : done + more], p[:, :more] / found[:more], tail)
        done += more
    # Where one round meets the next, the order may be wrong by rounding.
    return q, np.minimum.accumulate(s).astype(np.float32), long


def _first(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The first round: (q [R, R] and s [R] float64, long [R, N] float32, of which the first `done` rows are made)."""
    # Laid out like w, so that a transposed view costs no copy at either end.
    long = np.empty(w.shape, np.float32, order="F" if w.flags.f_contiguous else "C")
    q, s = _eigh(_gram(w))
    done = _resolved(s)
    _rows_into(long[:done], q[:, :done] / s[:done], w)
    return q, s, long, done


def _first_on_device(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """As `_first`, by the float64 of JAX's device."""
    with jax.enable_x64(True):
        wide, gram, trace = _gram_on_device(w)
        _require_finite(float(trace))
        q, s, long = map(np.array, _rows_on_device(wide, gram))
    return q, s, long, _resolved(s)


@jax.jit
def _gram_on_device(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = w.astype(jnp.float64)
    gram = jnp.matmul(wide, wide.T)
    return wide, gram, jnp.trace(gram)


@jax.jit
def _rows_on_device(wide: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    q, s = vectors[:, ::-1], jnp.sqrt(jnp.maximum(values[::-1], 0))
    return q, s, (jnp.matmul(q.T, wide) / jnp.where(s > 0, s, 1)[:, None]).astype(jnp.float32)


def _resolved(s: np.ndarray) -> int:
    """How many of the singular values [R], descending, one Gram matrix resolves."""
    return int(np.count_nonzero(s >= RESOLVED * s[0])) if len(s) and s[0] else 0


def _require_finite(trace: float) -> None:
    if not np.isfinite(trace):  # the sum of all squares: one entry of w is enough
        raise UserError("the weight holds NaN or infinite values and cannot be decomposed")


def _blocks(w: np.ndarray) -> Iterator[slice]:
    """Slices over the columns of w, of about BLOCK numbers each."""
    step = max(1, BLOCK // max(1, len(w)))
    return (slice(start, start + step) for start in range(0, w.shape[1], step))


def _gram(w: np.ndarray) -> np.ndarray:
    """w w^T in float64."""
    gram = np.zeros((len(w), len(w)))
    for columns in _blocks(w):
        block = w[:, columns].astype(np.float64)
        gram += block @ block.T  # numpy sees that it is symmetric: half the work
    return gram


def _eigh(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors [R, R] and the square roots of the eigenvalues, descending; overwrites `gram`.

    Raises:
      UserError: an entry is not finite.
    """
    import scipy.linalg  # as long as a third of JAX's import, and loading a model needs none of it

    _require_finite(np.trace(gram))
    values, vectors = scipy.linalg.eigh(gram.T, driver="evd", overwrite_a=True, check_finite=False)
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _rows_into(out: np.ndarray, q: np.ndarray, w: np.ndarray) -> None:
    """q^T w in float64, rounded to the dtype of `out`."""
    for columns in _blocks(w):
        out[:, columns] = q.T @ w[:, columns].astype(np.float64)


def _take_out(rows: np.ndarray, basis: np.ndarray) -> None:
    """Takes from float64 `rows` [T, N], in place, what they hold of the orthonormal `basis` [K, N]."""
    share = np.zeros((len(rows), len(basis)))
    for columns in _blocks(rows):
        share += rows[:, columns] @ basis[:, columns].astype(np.float64).T
    for columns in _blocks(rows):
        rows[:, columns] -= share @ basis[:, columns].astype(np.float64)


def _beside(basis: np.ndarray, count: int) -> np.ndarray:
    """`count` orthonormal rows, orthogonal to those of `basis` [K, N], the same each time; K + count <= N."""
    rows = np.random.default_rng(0).standard_normal((count, basis.shape[1]))
    for _ in range(2):  # the first leaves rounding of the random rows' size, which the second takes out
        _take_out(rows, basis)
        rows = np.ascontiguousarray(np.linalg.qr(rows.T).Q.T)
    return rows
