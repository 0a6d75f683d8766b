"""One linear layer W = U diag(s) V^T, three ways to run it with scaled singular values W' = U diag(s z) V^T.

| form     | computes                          | multiply-adds a token | when                                   |
|----------|-----------------------------------|-----------------------|----------------------------------------|
| dense    | x W'^T, W' = `merge(spectrum, z)` | D_out D_in            | one expert for all rows                |
| factored | ((x V) * (s z)) U^T               | R (D_out + D_in)      | training; a z per row, exactly         |
| delta    | x W^T + ((x V_k) * d) U_k^T       | D_out D_in + k (D_out + D_in) | a z per row, base rows untouched |

A layer holds its frozen weight and, perhaps, an adapter: any pytree that is called as `adapter(x, w)` and returns
the layer's product. `Factored` and `Delta` are two such; the model knows neither by name.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct


class Spectrum(NamedTuple):
    """Singular value decomposition of one weight [D_out, D_in], R = min(D_out, D_in), s descending."""

    u: Any  # [D_out, R], jax or host array
    s: Any  # [R]
    vt: Any  # [R, D_in]


class LinearAdapter(Protocol):
    """What a linear layer accepts in place of its plain product."""

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and the layer's frozen w [D_out, D_in]."""
        ...


_FEW_ROWS = 256


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w^T over the last axes. float32 means float32: no bfloat16 passes where the hardware would use them.

    For a few rows of x XLA's CPU product is faster with the weight as its left operand; for many the other way round,
    which has no result to turn (experiments/decode measures both).
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if x.size > _FEW_ROWS * x.shape[-1]:
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    rows = x if x.ndim > 2 else x[:, None]  # of a matrix XLA would turn it round again
    y = jax.lax.dot_general(w, rows, (((1,), (rows.ndim - 1,)), ((), ())), precision=precision)
    return jnp.moveaxis(y, 0, -1).reshape(*x.shape[:-1], w.shape[0])


@struct.dataclass
class Factored:
    """((x V) * (s z)) U^T; the layer's own weight is not read.

    Its gradient in z is s * sum over tokens of (V^T x) * (U^T g): no W', no gradient of W's shape. With float32
    factors z = 1 gives W's product to about 1e-6 relative; with bfloat16 factors to about 3e-3.
    """

    spectrum: Spectrum
    z: jax.Array  # [R], or [B, R]: one a row

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in]; w is not used."""
        u, s, vt = self.spectrum
        return dot(_scale(dot(x, vt), times(s, self.z)), u)


@struct.dataclass
class Delta:
    """x W^T + ((x V_k) * d) U_k^T with d = s (z - 1); a row whose d is 0 is the base row bit for bit."""

    u: jax.Array  # [D_out, k]
    vt: jax.Array  # [k, D_in]
    d: jax.Array  # [k], or [B, k]: one a row

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        return dot(x, w) + dot(_scale(dot(x, self.vt), self.d), self.u)


def delta(spectrum: Spectrum, z: jax.Array) -> Delta:
    """The delta form of z ([R] or [B, R]) on all R components."""
    return Delta(spectrum.u, spectrum.vt, times(spectrum.s, z - 1))


def merge(spectrum: Spectrum, z: jax.Array) -> jax.Array:
    """Dense weight with scaled singular values, U diag(s z) V^T.

    Transformer-Squared (arXiv 2501.06252), section 3.1. The public code also rescales by sum(s) / sum(s z), which
    here is the `sigmoid_nuclear` member of the family.

    Args:
      spectrum: u [D_out, R], s [R], vt [R, D_in].
      z: [R].
    Returns:
      [D_out, D_in] in the dtype of u; with float32 factors z = 1 reproduces W to about 1e-6 relative (Frobenius).
    """
    u, s, vt = spectrum
    scaled = u * (s * z).astype(u.dtype)[None, :]
    return jnp.matmul(scaled, vt, precision=jax.lax.Precision.HIGHEST)


def times(s: jax.Array, z: jax.Array) -> jax.Array:
    """s [R] times z [R] or [B, R]."""
    return jnp.reshape(s, (1,) * (z.ndim - 1) + s.shape) * z


def _scale(h: jax.Array, scale: jax.Array) -> jax.Array:
    """h [B, T, R] times scale [R] or [B, R], in the dtype of h."""
    scale = scale.astype(h.dtype)
    shape = (1,) * (h.ndim - 1) if scale.ndim == 1 else (scale.shape[0],) + (1,) * (h.ndim - 2)
    return h * scale.reshape(*shape, scale.shape[-1])
