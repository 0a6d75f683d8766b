"""What may stand between the singular vectors besides a diagonal, and how a layer runs with it.

A member of the family yields one **middle** a matrix:

| middle  | weight                                | adapter       | multiply-adds a token                     |
|---------|---------------------------------------|---------------|-------------------------------------------|
| z [R]   | U diag(s z) V^T                       | `Factored`    | R (D_out + D_in)                          |
| `Core`  | W + U_r C V_r^T, C [r, r]             | `CoreAdapter` | D_out D_in + r (D_out + D_in + r)         |
| `Bands` | W + U M V^T, M [R, R] with 2 w + 1 bands | `BandAdapter` | D_out D_in + R (D_out + D_in + 2 w + 1) |

The last two add to W's own product, so that a middle of zeros is the base bit for bit in every dtype. Neither forms
an array of W's shape, forwards or backwards; their gradients have the size of the middle.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.spectral import forms
from sva.spectral.forms import Factored, LinearAdapter, Spectrum
from sva.utils.matmul import dot


@struct.dataclass
class Core:
    """C between the r leading singular vectors: W' = W + U_r C V_r^T."""

    values: jax.Array  # [r, r] float32 (scanned: [L, r, r])


@struct.dataclass
class Bands:
    """The bands of M: W' = W + U M V^T, with M[i, i + o] = values[o + w, i] for the offsets o = -w..w."""

    values: jax.Array  # [2 w + 1, R] float32 (scanned: [L, 2 w + 1, R]); entries outside M are never read


Middle = jax.Array | Core | Bands


@struct.dataclass
class CoreAdapter:
    """x W^T + ((x V_r) C^T) U_r^T."""

    u: jax.Array  # [D_out, r]
    core: jax.Array  # [r, r]
    vt: jax.Array  # [r, D_in]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        return dot(x, w) + dot(dot(dot(x, self.vt), self.core.astype(x.dtype)), self.u)


@struct.dataclass
class BandAdapter:
    """x W^T + ((x V) M^T) U^T."""

    u: jax.Array  # [D_out, R]
    bands: jax.Array  # [2 w + 1, R]
    vt: jax.Array  # [R, D_in]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and w [D_out, D_in]."""
        return dot(x, w) + dot(band_product(self.bands.astype(x.dtype), dot(x, self.vt)), self.u)


def band_product(bands: jax.Array, h: jax.Array) -> jax.Array:
    """M h over the last axis of h [..., R], for the M whose bands [2 w + 1, R] are given: one shift of h a band."""
    count, size = bands.shape
    margin = [(0, 0)] * (h.ndim - 1) + [(count // 2, count // 2)]
    padded = jnp.pad(h, margin)
    rows = bands.reshape(count, *(1,) * (h.ndim - 1), size)
    return sum((rows[i] * padded[..., i : i + size] for i in range(count)), jnp.zeros_like(h))


def adapter(spectrum: Spectrum, middle: Middle) -> LinearAdapter:
    """The adapter of one matrix; of stacked ones (scanned layers), the stacked adapter."""
    u, _, vt = spectrum
    if isinstance(middle, Core):
        r = middle.values.shape[-1]
        return CoreAdapter(u[..., :r], middle.values, vt[..., :r, :])
    if isinstance(middle, Bands):
        return BandAdapter(u, middle.values, vt)
    return Factored(spectrum, middle)


def adapters(spectra: Mapping[str, Any], middles: Mapping[str, Any]) -> Any:
    """The adapter tree of two trees of the same structure, keyed by weight name or nested as the model's."""
    return jax.tree.map(lambda middle, spectrum: adapter(spectrum, middle), middles, spectra, is_leaf=_is_middle)


def _is_middle(x: Any) -> bool:
    return isinstance(x, Core | Bands)


def merge(w: jax.Array, spectrum: Spectrum, middle: Middle) -> jax.Array:
    """The dense weight [D_out, D_in] that a middle stands for.

    What the middle changes is added to w [D_out, D_in] in float32 and rounded once; that of the base gives w itself.
    """
    u, vt = (x.astype(jnp.float32) for x in (spectrum.u, spectrum.vt))
    if isinstance(middle, Core):
        r = middle.values.shape[-1]
        u, inner = u[:, :r], jnp.matmul(middle.values, vt[:r], precision=jax.lax.Precision.HIGHEST)
    elif isinstance(middle, Bands):
        inner = band_product(middle.values, vt.T).T
    else:
        return forms.merge(spectrum, middle, w)
    change = jnp.matmul(u, inner, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + change).astype(w.dtype)
