"""The modules of a mixture-of-experts layer on a mesh: each device runs its own modules on the rows of its group.

Modules lie over `moe`, a module's width over `tensor`; what `fsdp` divides of the weights is gathered as they are used.
Rows of a batch lie over `data` x `moe` x `fsdp`. The devices along `moe` are a group: each is sent the rows of all of
them, sorts their tokens by module, runs those that chose its modules, and a sum of which each keeps its own rows brings
the outputs together. All of it is said by hand (`jax.shard_map`): left to itself XLA would sort and multiply all tokens
on every device. Where rows do not divide, every device of a group has all of them to begin with.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from sva.models.moe_config import Moe
from sva.parallel.sharding import row_axes
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

    of_modules, of_width = axis("moe", moe.modules), axis("tensor", moe.width)
    own = moe.modules // mesh.shape[of_modules] if of_modules else moe.modules
    rows = row_axes(len(x), mesh)
    sent = of_modules if of_modules in rows else None  # the axis along which rows are sent to where modules are
    summed = tuple(name for name in (of_modules, of_width) if name and name != sent)
    parts = tuple(mesh.shape[name] for name in rows) if sent else ()

    def here(stacks: Any, x: jax.Array, modules: jax.Array, shares: jax.Array) -> jax.Array:
        if sent:
            x, modules, shares = (jax.lax.all_gather(part, sent, tiled=True) for part in (x, modules, shares))
        first = jax.lax.axis_index(of_modules) * own if of_modules else 0
        y = run(_scaled_by(stacks, _joined), x, modules - first, shares, count=own)
        y = jax.lax.psum(y, summed) if summed else y
        return jax.lax.psum_scatter(y, sent, tiled=True) if sent else y

    given = _scaled_by(stacks, partial(_split, parts=parts))
    specs = {name: _specs(name, stack, of_modules, of_width, rows) for name, stack in given.items()}
    tokens = P(rows)
    return jax.shard_map(here, in_specs=(specs, tokens, tokens, tokens), out_specs=tokens, check_vma=False)(
        given, x, modules, shares
    )


def _scaled_by(stacks: Mapping[str, tuple[Any, Any]], change: Callable[[jax.Array], jax.Array]) -> dict[str, Any]:
    """The stacks with their adapters' scales, [X, R] or [X, B, R], changed."""

    def one(adapter: Any) -> Any:
        if isinstance(adapter, Factored):
            return Factored(adapter.spectrum, change(adapter.z))
        return Delta(adapter.u, adapter.vt, change(adapter.d)) if isinstance(adapter, Delta) else adapter

    return {name: (w, one(adapter)) for name, (w, adapter) in stacks.items()}


def _split(scale: jax.Array, parts: tuple[int, ...]) -> jax.Array:
    """[X, *parts, B / parts, R] of scales [X, B, R] of B rows that lie in so many parts; others as they are.

    A group needs its rows' scales, which are not neighbours in B: modules take the axis that rows are sent along.
    """
    if not parts or scale.ndim < 3 or scale.shape[1] == 1:
        return scale
    return scale.reshape(scale.shape[0], *parts, -1, scale.shape[-1])


def _joined(scale: jax.Array) -> jax.Array:
    """The part of `_split` that a device has, [X, rows of its group, R]."""
    return scale.reshape(scale.shape[0], -1, scale.shape[-1]) if scale.ndim > 3 else scale


def _specs(
    name: str, stack: tuple[Any, Any], modules: str | None, width: str | None, rows: tuple[str, ...]
) -> tuple[Any, Any]:
    """How the (weight, adapter) of all modules lie: the module's width is what gate and up give and down takes."""
    w, adapter = stack
    out, into = (None, width) if name == "down_proj" else (width, None)
    u, vt = P(modules, out, None), P(modules, None, into)

    def scale(x: jax.Array) -> P:  # [X, R]; [X, B, R], of one row where all share it; or as `_split` has it
        if x.ndim > 3:
            return P(modules, *(None if name == modules else name for name in rows))
        return P(modules, rows if x.ndim == 3 and x.shape[1] > 1 else None)

    of_adapter = None
    if isinstance(adapter, Factored):
        of_adapter = Factored(Spectrum(u, P(modules, None), vt), scale(adapter.z))  # pyright: ignore[reportArgumentType]
    elif isinstance(adapter, Delta):
        of_adapter = Delta(u, vt, scale(adapter.d))  # pyright: ignore[reportArgumentType]
    elif adapter is not None:  # refused where it runs
        of_adapter = jax.tree.map(lambda _: P(modules), adapter)
    return (None if w is None else P(modules, out, into)), of_adapter
