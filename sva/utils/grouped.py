"""Products of many rows with one matrix out of X each, x_i w[g_i]^T, without a copy of a matrix for every row.

Rows are laid out by group, each group's rows one after another and padded to whole blocks:

    group of each row given      2 0 2 1 2
    laid out in blocks of 2      0 .   1 .   2 2   2 .      4 of at most 2 + 3 blocks in use

On a CPU a loop goes over the blocks that are in use and multiplies each with its group's matrix. Elsewhere it is one
`jax.lax.ragged_dot_general`, which XLA's CPU compiler (jaxlib 0.10) would write out as a product with all X matrices,
most of it with zeros: 300 ms for 1,024 rows on 64 matrices of 256 x 512, where the loop takes 12. Few rows are not
sorted: each is a block of its own, and elsewhere than on a CPU its matrix is gathered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout as memory

from sva.utils.matmul import Int8, floats

_FEW = 16  # rows
_BLOCK = (4, 256)  # rows, at least and at most
_UNSET = -1


class Groups(NamedTuple):
    """R rows laid out by group in blocks of R / len(group)."""

    group: jax.Array  # [blocks] int32, of each block; anything for those not in use
    used: jax.Array  # [] int32, blocks in use: the first ones
    sizes: jax.Array  # [X] int32, rows of each group, padding included


class Layout(NamedTuple):
    """Where M rows lie among the R rows laid out."""

    groups: Groups
    source: jax.Array  # [R] int32, the row that lies there; M for padding
    place: jax.Array  # [M] int32, where each row lies

    @property
    def block(self) -> int:
        """Rows of a block."""
        return len(self.source) // len(self.groups.group)


def lay_out(group: jax.Array, count: int) -> Layout:
    """The layout of rows whose groups [M] int32 are below `count`; rows of group `count` or more get no product."""
    rows, block = len(group), block_size(len(group), count)
    sizes = jnp.zeros(count, jnp.int32).at[group].add(1, mode="drop")
    numbers = jnp.arange(rows, dtype=jnp.int32)
    if block == 1:
        return Layout(Groups(group, jnp.asarray(rows, jnp.int32), sizes), numbers, numbers)
    blocks = -(-sizes // block)
    ends = jnp.cumsum(blocks)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    own = jnp.minimum(group, count - 1)
    within = jnp.zeros(rows, jnp.int32).at[order].set(numbers) - (jnp.cumsum(sizes) - sizes)[own]
    total = rows // block + min(count, rows)
    place = jnp.where(group < count, (ends - blocks)[own] * block + within, total * block)
    source = jnp.full(total * block, rows, jnp.int32).at[place].set(numbers, mode="drop")
    of_block = jnp.searchsorted(ends, jnp.arange(total, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Layout(Groups(jnp.minimum(of_block, count - 1), ends[-1], blocks * block), source, place)


def block_size(rows: int, count: int) -> int:
    """Rows of a block: 1 for a few rows, else half of what a group has on average, a power of two."""
    if rows <= _FEW:
        return 1
    least, most = _BLOCK
    return min(max(1 << max(rows // (2 * count), 1).bit_length() - 1, least), most)


def spread(x: jax.Array, layout: Layout) -> jax.Array:
    """[R, ...] of x [M, ...] laid out; padding is zero."""
    return jnp.take(x, layout.source, axis=0, mode="fill", fill_value=0)


def collect(y: jax.Array, layout: Layout) -> jax.Array:
    """[M, ...] of y [R, ...]: `spread` undone; rows without a group are zero."""
    return jnp.take(y, layout.place, axis=0, mode="fill", fill_value=0)


def of_rows(values: jax.Array, layout: Layout) -> jax.Array:
    """[R, ...] of values [X, ...]: each row its group's. Blocks' gradients are summed before they meet the groups."""
    found = jnp.take(values, layout.groups.group, axis=0, mode="clip")
    return jnp.repeat(found, layout.block, axis=0) if layout.block > 1 else found


def grouped_dot(x: jax.Array, w: Any, groups: Groups) -> jax.Array:
    """x_i w[g_i]^T of rows that are laid out; float32 means float32.

    Args:
      x: [R, D_in].
      w: [X, D_out, D_in] of x's dtype, or `Int8`.
      groups: of the rows.
    Returns:
      [R, D_out]; zeros, or what padding gives, where a block is not in use.
    """
    return _product(x, w, groups)


@partial(jax.custom_vjp, nondiff_argnums=())
def _product(x: jax.Array, w: Any, groups: Groups) -> jax.Array:
    return _either(x, w, groups, axis=2)


def _forward(x: Any, w: Any, groups: Any) -> tuple[jax.Array, Any]:
    values = jax.tree.map(lambda leaf: leaf.value, (x, w, groups), is_leaf=_is_primal)
    # The rows are kept only where a gradient of the matrices is asked for: those of a frozen model need none.
    is_trained = not isinstance(values[1], Int8) and w.perturbed
    return _product(*values), (values[0] if is_trained else None, *values[1:])


def _backward(kept: Any, g: Any) -> tuple[Any, Any, Any]:
    x, w, groups = kept
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    of_w = None
    if x is not None:
        chosen = jax.nn.one_hot(_group_of_rows(groups, len(x)), len(w), dtype=x.dtype)
        of_w = jnp.einsum("RX,RO,RI->XOI", chosen, g, x, precision=_precision(x))
    return _either(g, w, groups, axis=1), of_w, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _either(x: jax.Array, w: Any, groups: Groups, axis: int) -> jax.Array:
    """Each row's product with axis `axis` of its matrix, by the way that suits the machine."""
    is_sorted = len(x) > len(groups.group)  # else each row is a block: see `lay_out`
    other = partial(_ragged if is_sorted else _gathered, axis=axis)
    on_cpu: Callable[..., jax.Array] = partial(_by_blocks, axis=axis)
    return jax.lax.platform_dependent(x, w, groups, cpu=on_cpu, default=other)


def _by_blocks(x: jax.Array, w: Any, groups: Groups, axis: int) -> jax.Array:
    """A loop over the blocks in use."""
    size = len(x) // len(groups.group)
    width = w.shape[3 - axis]

    def one(block: jax.Array, out: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(x, block * size, size)
        matrix = floats(jax.tree.map(lambda leaf: leaf[groups.group[block]], w), x.dtype)
        y = jax.lax.dot_general(rows, matrix, (((1,), (axis - 1,)), ((), ())), precision=_precision(x))
        return jax.lax.dynamic_update_slice_in_dim(out, y, block * size, 0)

    return jax.lax.fori_loop(0, groups.used, one, jnp.zeros((len(x), width), x.dtype))


def _ragged(x: jax.Array, w: Any, groups: Groups, axis: int) -> jax.Array:
    """One product; rows beyond the last group are zeros.

    The matrices keep their layout in memory. Without that a TPU's compiler transposes the matrices of all layers at
    once, outside the loop over them, for the one of the two directions that wants them so, and holds both.
    """
    matrices = memory.with_layout_constraint(floats(w, x.dtype), memory.Layout((0, 1, 2)))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (axis,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return jax.lax.ragged_dot_general(x, matrices, groups.sizes, numbers, precision=_precision(x))


def _gathered(x: jax.Array, w: Any, groups: Groups, axis: int) -> jax.Array:
    """A copy of its matrix for each of a few rows."""
    matrices = floats(jax.tree.map(lambda leaf: jnp.take(leaf, groups.group, axis=0, mode="clip"), w), x.dtype)
    numbers = (((1,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(x, matrices, numbers, precision=_precision(x))


def _group_of_rows(groups: Groups, rows: int) -> jax.Array:
    """[R] int32, a number that is no group for rows of blocks not in use."""
    blocks = jnp.arange(len(groups.group), dtype=jnp.int32)
    return jnp.repeat(jnp.where(blocks < groups.used, groups.group, _UNSET), rows // len(groups.group))


def _precision(x: jax.Array) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
