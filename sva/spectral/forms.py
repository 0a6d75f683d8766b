"""One linear layer W = U diag(s) V^T, three ways to run it with scaled singular values W' = U diag(s z) V^T.

| form     | computes                          | multiply-adds a token | when                                   |
|----------|-----------------------------------|-----------------------|----------------------------------------|
| dense    | x W'^T, W' = `merge(spectrum, z)` | D_out D_in            | one expert for all rows                |
| factored | ((x V) * (s z)) U^T               | R (D_out + D_in)      | training; a z per row, exactly         |
| delta    | x W^T + ((x V_k) * d) U_k^T       | D_out D_in + k (D_out + D_in) | a z per row, base rows untouched |

A layer holds its frozen weight and, perhaps, an adapter: any pytree that is called as `adapter(x, w)` and returns
the layer's product. `Factored` and `Delta` are two such; the model knows neither by name. Members that need no
spectrum (`sva.adapters`) have adapters of their own, which are their z. Which form is the cheapest is said in
`sva.spectral.cost`.

Two parametrisations put more than a diagonal between the singular vectors. Their z is a struct of its own:

| z              | weight                                   | adapter       | multiply-adds a token                   |
|----------------|------------------------------------------|---------------|-----------------------------------------|
| array [R]      | U diag(s z) V^T                          | `Factored`    | R (D_out + D_in)                        |
| `Core`         | W + U_r C V_r^T, C [r, r]                | `CoreAdapter` | D_out D_in + r (D_out + D_in + r)       |
| `Bands`        | W + U M V^T, M [R, R] with 2 w + 1 bands | `BandAdapter` | D_out D_in + R (D_out + D_in + 2 w + 1) |

The last two add to W's own product, so that a z of zeros is the base bit for bit in every dtype. Neither forms an
array of W's shape, forwards or backwards; their gradients have the size of z.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters.family import Adapter, LinearAdapter
from sva.parallel.sharding import constrain, inner_axes
from sva.utils.errors import UserError
from sva.utils.matmul import dot


class Spectrum(NamedTuple):
    """Singular value decomposition of one weight [D_out, D_in], R = min(D_out, D_in), s descending."""

    u: Any  # [D_out, R], jax or host array
    s: Any  # [R]
    vt: Any  # [R, D_in]


@struct.dataclass
class Core:
    """C between the r leading singular vectors: W' = W + U_r C V_r^T."""

    values: jax.Array  # [r, r] float32 (scanned: [L, r, r])


@struct.dataclass
class Bands:
    """The bands of M: W' = W + U M V^T, with M[i, i + o] = values[o + w, i] for the offsets o = -w..w."""

    values: jax.Array  # [2 w + 1, R] float32 (scanned: [L, 2 w + 1, R]); entries outside M are never read


Z = jax.Array | Core | Bands | Adapter
"""What an expert does to one matrix."""


def require_vector(name: str, z: Any) -> None:
    """Raises UserError for a z that is more than one number a singular value."""
    if isinstance(z, Core | Bands | Adapter):
        raise UserError(
            f"{name}: z is a {type(z).__name__}, not one number for each singular value; such an expert can be merged "
            "(sva.merge), not mixed, exported in low rank or given to single rows"
        )


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
        return dot(_scale(_inner(x, vt), times(s, self.z)), u)


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
        return base + dot(_scale(_inner(x, self.vt), self.d), self.u)


def delta(spectrum: Spectrum, z: jax.Array, components: Any = None) -> Delta:
    """The delta form of z ([R] or [B, R]) on the components of these indices [k]; on all R by default."""
    u, s, vt = spectrum
    d = times(s, z - 1)
    if components is None:
        return Delta(u, vt, d)
    return Delta(u[:, components], vt[components], d[..., components])


def merge(spectrum: Any, z: Z, w: jax.Array | None = None) -> jax.Array:
    """Dense weight with scaled singular values, W' = U diag(s z) V^T; for a `Core` or `Bands`, W + U z V^T.

    An `Adapter` merges itself into w, in the dtype of w; the first argument is then not read.

    Transformer-Squared (arXiv 2501.06252), section 3.1. The public code also rescales by sum(s) / sum(s z), which
    here is the `sigmoid_nuclear` member of the family.

    Args:
      spectrum: u [D_out, R], s [R], vt [R, D_in].
      z: [R], `Core` or `Bands`.
      w: [D_out, D_in], the weight that was decomposed; a `Core` and `Bands` need it. With it W' is
        w + U diag(s (z - 1)) V^T: z = 1 gives w back bit for bit, and what a truncated spectrum leaves out stays.
    Returns:
      [D_out, D_in] in the dtype of u, summed in float32. Relative error (Frobenius): with float32 factors about 1e-6
      with or without w; with bfloat16 factors about 3e-3 without w, and with it that of rounding W', 1.8e-3.
    """
    if isinstance(z, Adapter):
        assert w is not None
        return z.merge(w.astype(jnp.float32)).astype(w.dtype)
    u, s, vt = (x.astype(jnp.float32) for x in spectrum)
    if isinstance(z, Core):
        r = z.values.shape[-1]
        u, inner = u[:, :r], jnp.matmul(z.values, vt[:r], precision=jax.lax.Precision.HIGHEST)
    elif isinstance(z, Bands):
        inner = band_product(z.values, vt.T).T
    else:
        u, inner = u * (s * (z if w is None else z - 1))[None, :], vt
    change = jnp.matmul(u, inner, precision=jax.lax.Precision.HIGHEST)
    return (change if w is None else w.astype(jnp.float32) + change).astype(spectrum.u.dtype)


def times(s: jax.Array, z: jax.Array) -> jax.Array:
    """s [R] times z [R] or [B, R]."""
    return jnp.reshape(s, (1,) * (z.ndim - 1) + s.shape) * z


def _inner(x: jax.Array, vt: jax.Array) -> jax.Array:
    """x V [B, T, R] of x [B, T, D_in]."""
    h = dot(x, vt)
    return constrain(h, *inner_axes(h.shape[1])) if h.ndim == 3 else h


def _scale(h: jax.Array, scale: jax.Array) -> jax.Array:
    """h [B, T, R] times scale [R] or [B, R], in float32, given back in the dtype of h."""
    shape = (1,) * (h.ndim - 1) if scale.ndim == 1 else (scale.shape[0],) + (1,) * (h.ndim - 2)
    return (h.astype(jnp.float32) * scale.reshape(*shape, scale.shape[-1])).astype(h.dtype)


@struct.dataclass
class CoreAdapter:
    """x W^T + ((x V_r) C^T) U_r^T."""

    u: jax.Array  # [D_out, r]
    core: jax.Array  # [r, r]
    vt: jax.Array  # [r, D_in]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        return dot(x, w) + dot(dot(_inner(x, self.vt), self.core.astype(x.dtype)), self.u)


@struct.dataclass
class BandAdapter:
    """x W^T + ((x V) M^T) U^T."""

    u: jax.Array  # [D_out, R]
    bands: jax.Array  # [2 w + 1, R]
    vt: jax.Array  # [R, D_in]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        return dot(x, w) + dot(band_product(self.bands.astype(x.dtype), _inner(x, self.vt)), self.u)


def band_product(bands: jax.Array, h: jax.Array) -> jax.Array:
    """M h over the last axis of h [..., R], for the M whose bands [2 w + 1, R] are given: one shift of h a band."""
    count, size = bands.shape
    margin = [(0, 0)] * (h.ndim - 1) + [(count // 2, count // 2)]
    padded = jnp.pad(h, margin)
    rows = bands.reshape(count, *(1,) * (h.ndim - 1), size)
    return sum((rows[i] * padded[..., i : i + size] for i in range(count)), jnp.zeros_like(h))


def adapter(spectrum: Any, z: Z) -> LinearAdapter:
    """The adapter of one matrix; of stacked ones (scanned layers), the stacked adapter."""
    if isinstance(z, Adapter):
        return z
    u, _, vt = spectrum
    if isinstance(z, Core):
        r = z.values.shape[-1]
        return CoreAdapter(u[..., :r], z.values, vt[..., :r, :])
    if isinstance(z, Bands):
        return BandAdapter(u, z.values, vt)
    return Factored(spectrum, z)


def adapters(spectra: Mapping[str, Any], z: Mapping[str, Any]) -> Any:
    """The adapter tree of two trees of the same structure, keyed by weight name or nested as the model's."""
    return jax.tree.map(lambda z, spectrum: adapter(spectrum, z), z, spectra, is_leaf=_is_struct)


def _is_struct(x: Any) -> bool:
    return isinstance(x, Core | Bands | Adapter)
