"""One linear layer W = U diag(s) V^T, three ways to run it with scaled singular values W' = U diag(s z) V^T.

| form     | computes                          | multiply-adds a token | when                                   |
|----------|-----------------------------------|-----------------------|----------------------------------------|
| dense    | x W'^T, W' = `merge(spectrum, z)` | D_out D_in            | one expert for all rows                |
| factored | ((x V) * (s z)) U^T               | R (D_out + D_in)      | training; a z per row, exactly         |
| delta    | x W^T + ((x V_k) * d) U_k^T       | D_out D_in + k (D_out + D_in) | a z per row, base rows untouched |

A layer holds its frozen weight and, perhaps, an adapter: any pytree that is called as `adapter(x, w)` and returns
the layer's product. `Factored` and `Delta` are two such; the model knows neither by name, and LoRA, IA3 or DoRA join
as they do (tests/test_forms.py has all three). Which form is the cheapest is said in `sva.spectral.cost`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from sva.utils.matmul import dot


class Spectrum(NamedTuple):
    """Singular value decomposition of one weight [D_out, D_in], R = min(D_out, D_in), s descending."""

    u: Any  # [D_out, R], jax or host array
    s: Any  # [R]
    vt: Any  # [R, D_in]


class LinearAdapter(Protocol):
    """What a linear layer accepts in place of its plain product.

    The layer adds its bias b afterwards: an adapter that scales outputs, b included, holds a copy and adds (l - 1) b.
    """

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and the layer's frozen w [D_out, D_in]."""
        ...


@struct.dataclass
class Factored:
    """((x V) * (s z)) U^T; the layer's own weight is not read.

    Its gradient in z is s * sum over tokens of (V^T x) * (U^T g), summed in float32: no W', no gradient of W's shape.
    With float32 factors z = 1 gives W's product to about 1e-6 relative; with bfloat16 factors to about 4e-3.
    """

    spectrum: Spectrum
    z: jax.Array  # [R], or [B, R]: one a row

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in]; w is not used."""
        u, s, vt = self.spectrum
        return dot(_scale(dot(x, vt), times(s, self.z)), u)


@struct.dataclass
class Delta:
    """x W^T + ((x V_k) * d) U_k^T with d = s (z - 1); a row whose d is 0 is the base row bit for bit, in any dtype."""

    u: jax.Array  # [D_out, k]
    vt: jax.Array  # [k, D_in]
    d: jax.Array  # [k], or [B, k]: one a row

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        # Behind a barrier: a matrix product that adds the change as it sums need not round as the base's product does.
        base = jax.lax.optimization_barrier(dot(x, w))
        return base + dot(_scale(dot(x, self.vt), self.d), self.u)


def delta(spectrum: Spectrum, z: jax.Array, components: Any = None) -> Delta:
    """The delta form of z ([R] or [B, R]) on the components of these indices [k]; on all R by default."""
    u, s, vt = spectrum
    d = times(s, z - 1)
    if components is None:
        return Delta(u, vt, d)
    return Delta(u[:, components], vt[components], d[..., components])


def merge(spectrum: Spectrum, z: jax.Array, w: jax.Array | None = None) -> jax.Array:
    """Dense weight with scaled singular values, W' = U diag(s z) V^T.

    Transformer-Squared (arXiv 2501.06252), section 3.1. The public code also rescales by sum(s) / sum(s z), which
    here is the `sigmoid_nuclear` member of the family.

    Args:
      spectrum: u [D_out, R], s [R], vt [R, D_in].
      z: [R].
      w: [D_out, D_in], the weight that was decomposed. With it W' is w + U diag(s (z - 1)) V^T: z = 1 gives w back bit
        for bit, and what a truncated spectrum leaves out stays.
    Returns:
      [D_out, D_in] in the dtype of u, summed in float32. Relative error (Frobenius): with float32 factors about 1e-6
      with or without w; with bfloat16 factors about 3e-3 without w, and with it that of rounding W', 1.8e-3.
    """
    u, s, vt = (x.astype(jnp.float32) for x in spectrum)
    scale = s * (z if w is None else z - 1)
    change = jnp.matmul(u * scale[None, :], vt, precision=jax.lax.Precision.HIGHEST)
    return (change if w is None else w.astype(jnp.float32) + change).astype(spectrum.u.dtype)


def times(s: jax.Array, z: jax.Array) -> jax.Array:
    """s [R] times z [R] or [B, R]."""
    return jnp.reshape(s, (1,) * (z.ndim - 1) + s.shape) * z


def _scale(h: jax.Array, scale: jax.Array) -> jax.Array:
    """h [B, T, R] times scale [R] or [B, R], in float32, given back in the dtype of h."""
    shape = (1,) * (h.ndim - 1) if scale.ndim == 1 else (scale.shape[0],) + (1,) * (h.ndim - 2)
    return (h.astype(jnp.float32) * scale.reshape(*shape, scale.shape[-1])).astype(h.dtype)
