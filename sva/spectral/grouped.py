"""The forms of `sva.spectral.forms` where every row of the input meets one matrix out of X: a mixture of experts.

Spectra and z are stacked, [X, ...]. Nothing of the weights' shape [X, D_out, D_in] is formed, forwards or backwards:
z's gradient is summed over each block's rows and then added where the block's matrix has it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sva.spectral.forms import Delta, Factored
from sva.utils.errors import UserError
from sva.utils.grouped import Layout, grouped_dot, of_rows


def grouped(adapter: Any, x: jax.Array, w: Any, layout: Layout, batch_row: jax.Array) -> jax.Array:
    """[R, D_out]: what an adapter of X stacked matrices makes of rows laid out by matrix.

    Args:
      adapter: `Factored` or `Delta`, every array with X in front: z [X, R], or [X, B, R] where each row of the batch
        has its own; None for the plain product.
      x: [R, D_in], laid out.
      w: [X, D_out, D_in]; `Factored` does not read it.
      layout: of the rows.
      batch_row: [R] int32, the row of the batch that each is of.
    Raises:
      UserError: another kind of adapter.
    """
    groups = layout.groups
    if adapter is None:
        return grouped_dot(x, w, groups)
    if isinstance(adapter, Factored):
        u, s, vt = adapter.spectrum
        scale = s * adapter.z if adapter.z.ndim == 2 else s[:, None] * adapter.z
        return grouped_dot(_scaled(grouped_dot(x, vt, groups), scale, layout, batch_row), u, groups)
    if isinstance(adapter, Delta):
        # Behind a barrier, as in `Delta` itself: a row of the base is the base bit for bit.
        base = jax.lax.optimization_barrier(grouped_dot(x, w, groups))
        change = _scaled(grouped_dot(x, adapter.vt, groups), adapter.d, layout, batch_row)
        return base + grouped_dot(change, adapter.u, groups)
    raise UserError(
        f"{type(adapter).__name__} does not run in the modules of a mixture of experts; merge it (sva.merge), or train "
        "a parametrisation with a z there (linear, sigmoid_nuclear, top_k, tail_only)"
    )


def _scaled(h: jax.Array, scale: jax.Array, layout: Layout, batch_row: jax.Array) -> jax.Array:
    """h [R, K] times its matrix's scale [X, K] or [X, B, K], in float32, given back in the dtype of h."""
    if scale.ndim == 2:
        own = of_rows(scale, layout)
    else:
        group = jnp.repeat(layout.groups.group, layout.block)
        own = scale.at[group, batch_row].get(mode="clip")
    return (h.astype(jnp.float32) * own).astype(h.dtype)
