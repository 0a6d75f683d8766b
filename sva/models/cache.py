"""Keys and values of tokens read so far, as segments of fixed shape.

A batch attends to a sequence of segments, each written once and then only read, and to the tokens of the call itself.
A segment may have fewer rows than the batch: an instruction that all rows share has one, the prompts of G samples each
have one for G rows. What is generated goes into the slots of a `DecodeCache`, one call after another.

    past:    [ instruction, 1 row ] [ prompts, P rows ]      cache:  [ generated, B rows ... free slots ]

The keys of a segment may lie in blocks of slots. Where layers are unrolled on a CPU, which decodes fastest so, what
rows decode over has blocks of 32 once it has more than 96 slots: XLA's CPU product of a few queries with many
keys takes up to three times as long for each (experiments/benchmarks/engine/attention.py).
Otherwise there is no block axis: with an axis of size 1 XLA on CPU copies the keys four times a step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.models.config import ModelConfig
from sva.models.stacks import Scan, stacks
from sva.parallel.sharding import constrain
from sva.utils.padding import round_up

BLOCK = 32  # slots
_FEW = 96  # slots, which are as fast in one block


@struct.dataclass
class Rounded:
    """Keys or values as int8 numbers and one float32 scale for every slot of every head: x = q * scale."""

    q: jax.Array  # int8, -127 to 127
    scale: jax.Array  # the shape of q with 1 in the place of H


class KV(NamedTuple):
    """One layer's keys and values, of K heads of width H, as the products read them: arrays, or `Rounded`."""

    k: Any  # [P, K, H, S], or in N blocks of W slots [P, K, N, H, W], S = N * W
    v: Any  # [P, K, S, H]

    @property
    def in_blocks(self) -> bool:
        """Whether the keys are."""
        k, v = (jax.tree.leaves(x)[0] for x in self)
        return k.ndim > v.ndim


@struct.dataclass
class KVSegment:
    """Keys and values of S slots for P rows; P divides the batch B, whose row b reads row b // (B / P)."""

    kv: Any  # a KV a layer, in a tuple; where layers are scanned a KV of [L, ...] a stack
    positions: jax.Array  # [P, S] int32, each slot's position in its row
    valid: jax.Array  # [P, S] bool, False for padding and for slots not yet written


@struct.dataclass
class DecodeCache:
    """Slots that are filled call by call, all rows at the same index."""

    segment: KVSegment
    index: jax.Array  # [] int32, the next slot to write


def kept(k: jax.Array, v: jax.Array, dtype: Any) -> KV:
    """Keys [..., H, S] and values [..., S, H] in the dtype that they are kept in.

    int8 is off by half a step at most, 1/254 of the largest number of a slot and head; no gradient passes it.
    """
    return KV(_kept(k, dtype, axis=-2), _kept(v, dtype, axis=-1))


def _kept(x: jax.Array, dtype: Any, axis: int) -> Any:
    if dtype != jnp.int8:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return Rounded(jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def blocks_of(slots: int, *, scan: Scan) -> tuple[int, int]:
    """(N, W): the blocks of a segment that is to hold so many slots, and their size; one stands for no blocks."""
    if scan or slots <= _FEW or jax.default_backend() != "cpu":
        return 1, slots
    return round_up(slots, BLOCK) // BLOCK, BLOCK


def empty(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: Scan) -> KVSegment:
    """A segment for `rows` rows in which nothing is written, of at least `slots` slots (`blocks_of`)."""
    blocks, size = blocks_of(slots, scan=scan)

    def layer(*lead: int) -> KV:
        shape, width = (*lead, rows, cfg.num_kv_heads), cfg.head_dim
        k = jnp.zeros((*shape, blocks, width, size) if blocks > 1 else (*shape, width, size))
        return kept(k, jnp.zeros((*shape, blocks * size, width)), dtype)

    leads = [(stack.size,) for stack in stacks(cfg.num_layers, scan)] or [()] * cfg.num_layers
    return KVSegment(
        kv=tuple(layer(*lead) for lead in leads),
        positions=jnp.zeros((rows, blocks * size), jnp.int32),
        valid=jnp.zeros((rows, blocks * size), bool),
    )


def start(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: Scan) -> DecodeCache:
    """At least so many free slots for `rows` rows, to be filled from the first on."""
    return DecodeCache(empty(cfg, rows, slots, dtype, scan=scan), jnp.zeros((), jnp.int32))


def mark(cache: DecodeCache, positions: jax.Array, valid: jax.Array) -> KVSegment:
    """The segment with its next slot said to be written (`positions`, `valid` are [B, 1]); the model writes it."""
    start = (jnp.zeros((), jnp.int32), cache.index)
    return dataclasses.replace(
        cache.segment,
        positions=jax.lax.dynamic_update_slice(cache.segment.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(cache.segment.valid, valid, start),
    )


def write(kv: KV, own: KV, index: jax.Array) -> KV:
    """The slots with those of `own`, which lie in no blocks, in the place of as many from slot `index` [] on.

    Where `kv` is in blocks, they must fall within one of them.
    """

    def key(x: jax.Array, y: jax.Array) -> jax.Array:
        start = [jnp.zeros((), index.dtype)] * x.ndim
        if not kv.in_blocks:
            start[-1] = index
            return jax.lax.dynamic_update_slice(x, y, start)
        start[-3], start[-1] = index // x.shape[-1], index % x.shape[-1]
        return jax.lax.dynamic_update_slice(x, jnp.expand_dims(y, -3), start)

    def value(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y, index, x.ndim - 2)

    return KV(jax.tree.map(key, kv.k, own.k), jax.tree.map(value, kv.v, own.v))


def slots_of(segments: Sequence[KVSegment], rows: int) -> tuple[jax.Array, jax.Array]:
    """(positions, valid), each [rows, S], of all segments' slots in turn, as a batch of so many rows sees them."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, rows // x.shape[0], axis=0)

    positions = jnp.concatenate([spread(segment.positions) for segment in segments], axis=1)
    return positions, jnp.concatenate([spread(segment.valid) for segment in segments], axis=1)


def resize(segment: KVSegment, slots: int) -> KVSegment:
    """The segment with so many slots, as `empty` has them: free ones added at its end, or the last ones dropped."""
    num_blocks, size = blocks_of(slots, scan=_row_axis(segment) == 1)

    def fit(x: jax.Array, axis: int, length: int) -> jax.Array:
        more = length - x.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])

    def both(kv: KV) -> KV:
        def key(x: jax.Array) -> jax.Array:
            if num_blocks > 1 and kv.in_blocks:
                return fit(x, -3, num_blocks)
            if num_blocks == 1 and not kv.in_blocks:
                return fit(x, -1, size)
            x = x.swapaxes(-1, -2)  # [..., W, H], whose slots follow one another
            x = x.reshape(*x.shape[:-3], -1, x.shape[-1]) if kv.in_blocks else x
            x = fit(x, -2, num_blocks * size)
            x = x.reshape(*x.shape[:-2], num_blocks, size, x.shape[-1]) if num_blocks > 1 else x
            return x.swapaxes(-1, -2)

        v = jax.tree.map(lambda x: fit(x, -2, num_blocks * size), kv.v)
        return KV(jax.tree.map(key, kv.k), v)

    kv = jax.tree.map(both, segment.kv, is_leaf=lambda x: isinstance(x, KV))
    positions, valid = (fit(x, 1, num_blocks * size) for x in (segment.positions, segment.valid))
    return KVSegment(kv, positions, valid)


def rows(segment: KVSegment, indices: jax.Array) -> KVSegment:
    """The segment of these rows."""
    return _by_row(lambda axis, x: jnp.take(x, indices, axis=axis, mode="clip"), segment)


def replace_rows(segment: KVSegment, indices: jax.Array, others: KVSegment) -> KVSegment:
    """The segment with other rows, of as many slots, in the place of these; an index that is no row drops its row."""

    def put(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[(slice(None),) * axis + (indices,)].set(y, mode="drop")

    return _by_row(put, segment, others)


def constrained(segment: KVSegment) -> KVSegment:
    """The segment as it lies on a mesh, if one is set: rows divided, and heads of keys and values."""

    def on_mesh(axis: int, x: jax.Array) -> jax.Array:
        heads = ("kv_heads",) if x.ndim > 2 else ()
        axes = (*(None,) * axis, "batch", *heads)
        return constrain(x, *axes, *(None,) * (x.ndim - len(axes)))

    return _by_row(on_mesh, segment)


def append(segment: KVSegment, used: jax.Array, new: KVSegment) -> KVSegment:
    """The segment with the slots of `new`, of as many rows, written in each row from slot `used` [P] on (`write`)."""
    axis = _row_axis(segment)

    def both(kv: KV, new: KV) -> KV:
        return jax.vmap(write, (axis, axis, 0), axis)(kv, new, used)

    def mark(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(x, y, used)

    kv = jax.tree.map(both, segment.kv, new.kv, is_leaf=lambda x: isinstance(x, KV))
    return KVSegment(kv, mark(segment.positions, new.positions), mark(segment.valid, new.valid))


def _by_row(change: Callable[..., jax.Array], segment: KVSegment, *others: KVSegment) -> KVSegment:
    """`change(row axis, leaf, leaves of the others)` of every leaf."""
    kv = jax.tree.map(partial(change, _row_axis(segment)), segment.kv, *(other.kv for other in others))
    of = [(each.positions, each.valid) for each in (segment, *others)]
    return KVSegment(kv, *(change(0, *leaves) for leaves in zip(*of, strict=True)))


def _row_axis(segment: KVSegment) -> int:
    """The axis of the rows in keys and values: 1 where layers are scanned, and so come first."""
    return jax.tree.leaves(segment.kv[0].v)[0].ndim - 4
