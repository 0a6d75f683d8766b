"""The modules of a mixture-of-experts layer on a mesh: each device runs the tokens of its rows through its own modules.

Rows of a batch lie over `data` x `fsdp` where they divide, modules over `moe`, a module's width over `tensor`; what
`fsdp` divides of the weights is gathered as they are used. Sorting tokens by module is a device's own affair, and one
sum over `moe` x `tensor` brings the outputs together. All of it is said by hand (`jax.shard_map`): left to itself XLA
would sort and multiply all tokens on every device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from sva.models.moe_config import Moe
from sva.spectral.forms import Delta, Factored, Spectrum


def divided(
    run: Callable[..., jax.Array],
    stacks: Mapping[str, tuple[Any, Any]],
    x: jax.Array,
    modules: jax.Array,
    shares: jax.Array,
    moe: Moe,
) -> jax.Array:
    """run(stacks, x, modules, shares), on each device of the mesh that is set with its own part of them.

    Args:
      run: `sva.models.moe.run_modules` of all modules.
      stacks: {name: (weight [X, D_out, D_in], adapter)}.
      x: [B, T, D].
      modules: [B, T, K] int32.
      shares: [B, T, K].
      moe: the sizes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(stacks, x, modules, shares)

    def axis(name: str, size: int) -> str | None:
        return name if mesh.shape.get(name, 1) > 1 and size % mesh.shape[name] == 0 else None

    rows = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    parts = 1
    for name in rows:
        parts *= mesh.shape[name]
    batch = rows if rows and len(x) % parts == 0 else None
    of_modules, of_width = axis("moe", moe.modules), axis("tensor", moe.width)
    own = moe.modules // mesh.shape[of_modules] if of_modules else moe.modules
    summed = tuple(name for name in (of_modules, of_width) if name)

    def here(stacks: Any, x: jax.Array, modules: jax.Array, shares: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(of_modules) * own if of_modules else 0
        y = partial(run, count=own)(stacks, x, modules - first, shares)
        return jax.lax.psum(y, summed) if summed else y

    specs = {name: _specs(name, stack, of_modules, of_width, batch) for name, stack in stacks.items()}
    tokens = P(batch)
    return jax.shard_map(here, in_specs=(specs, tokens, tokens, tokens), out_specs=tokens, check_vma=False)(
        dict(stacks), x, modules, shares
    )


def _specs(
    name: str, stack: tuple[Any, Any], modules: str | None, width: str | None, batch: tuple[str, ...] | None
) -> tuple[Any, Any]:
    """How the (weight, adapter) of all modules lie: the module's width is what gate and up give and down takes."""
    w, adapter = stack
    out, into = (None, width) if name == "down_proj" else (width, None)
    u, vt = P(modules, out, None), P(modules, None, into)

    def scale(x: jax.Array) -> P:  # [X, R], or [X, B, R]: of one row where all share it
        return P(modules, batch if x.shape[1] > 1 else None, None) if x.ndim == 3 else P(modules, None)

    of_adapter = None
    if isinstance(adapter, Factored):
        of_adapter = Factored(Spectrum(u, P(modules, None), vt), scale(adapter.z))  # pyright: ignore[reportArgumentType]
    elif isinstance(adapter, Delta):
        of_adapter = Delta(u, vt, scale(adapter.d))  # pyright: ignore[reportArgumentType]
    elif adapter is not None:  # refused where it runs
        of_adapter = jax.tree.map(lambda _: P(modules), adapter)
    return (None if w is None else P(modules, out, into)), of_adapter
