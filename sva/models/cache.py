"""Keys and values of tokens read so far, as parts of fixed shape.

A batch attends to a sequence of parts, each written once and then only read, and to the tokens of the call itself. A
part may have fewer rows than the batch: an instruction that all rows share has one, the prompts of G samples each have
one for G rows. What is generated goes into the slots of `Recent`, one call after another.

    past:    [ instruction, 1 row ] [ prompts, P rows ]      recent:  [ generated, B rows ... free slots ]

The keys of a part lie in blocks of slots. Where layers are unrolled, which is the form for fast decoding on a CPU, what
rows decode over has blocks of 32 once it has more than 96 slots: XLA's CPU product of a few queries with many keys
takes up to three times as long for each (experiments/engine/attention.py). Where layers are scanned, and in what a
call has just read, all slots are one block.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.buckets import round_up
from sva.models.config import ModelConfig

BLOCK = 32  # slots
_FEW = 96  # slots, which are as fast in one block


class KV(NamedTuple):
    """One layer's keys and values, of K heads of width H, as the products read them; keys in N blocks of W slots."""

    k: Any  # [P, K, N, H, W]
    v: Any  # [P, K, S, H], S = N * W


@struct.dataclass
class Part:
    """Keys and values of S slots for P rows; P divides the batch B, whose row b reads row b // (B / P)."""

    kv: Any  # a KV a layer, in a tuple; where layers are scanned one KV of [L, ...]
    positions: jax.Array  # [P, S] int32, each slot's position in its row
    valid: jax.Array  # [P, S] bool, False for padding and for slots not yet written


@struct.dataclass
class Recent:
    """Slots that are filled call by call, all rows at the same place."""

    part: Part
    index: jax.Array  # [] int32, the next slot to write


def blocks_of(slots: int, *, scan: bool) -> tuple[int, int]:
    """(N, W): the blocks of a part that is to hold so many slots, and their size."""
    return (1, slots) if scan or slots <= _FEW else (round_up(slots, BLOCK) // BLOCK, BLOCK)


def empty(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: bool) -> Part:
    """A part for `rows` rows in which nothing is written, of at least `slots` slots (`blocks_of`)."""
    blocks, size = blocks_of(slots, scan=scan)

    def layer(*lead: int) -> KV:
        shape, width = (*lead, rows, cfg.num_kv_heads), cfg.head_dim
        k = jnp.zeros((*shape, blocks, width, size), dtype)
        return KV(k, jnp.zeros((*shape, blocks * size, width), dtype))

    return Part(
        kv=layer(cfg.num_layers) if scan else tuple(layer() for _ in range(cfg.num_layers)),
        positions=jnp.zeros((rows, blocks * size), jnp.int32),
        valid=jnp.zeros((rows, blocks * size), bool),
    )


def start(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: bool) -> Recent:
    """At least so many free slots for `rows` rows, to be filled from the first on."""
    return Recent(empty(cfg, rows, slots, dtype, scan=scan), jnp.zeros((), jnp.int32))


def mark(recent: Recent, positions: jax.Array, valid: jax.Array) -> Part:
    """The part with its next slot said to be written (`positions`, `valid` are [B, 1]); the model writes it."""
    start = (jnp.zeros((), jnp.int32), recent.index)
    return dataclasses.replace(
        recent.part,
        positions=jax.lax.dynamic_update_slice(recent.part.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(recent.part.valid, valid, start),
    )


def slots_of(parts: Sequence[Part], rows: int) -> tuple[jax.Array, jax.Array]:
    """(positions, valid), each [rows, S], of all parts' slots in turn, as a batch of so many rows sees them."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, rows // x.shape[0], axis=0)

    positions = jnp.concatenate([spread(part.positions) for part in parts], axis=1)
    return positions, jnp.concatenate([spread(part.valid) for part in parts], axis=1)


def resize(part: Part, slots: int) -> Part:
    """The part with so many slots, as `empty` has them: free ones added at its end, or the last ones dropped."""
    num_blocks, size = blocks_of(slots, scan=isinstance(part.kv, KV))

    def fit(x: jax.Array, axis: int, length: int) -> jax.Array:
        more = length - x.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])

    def both(kv: KV) -> KV:
        v = fit(kv.v, -2, num_blocks * size)
        if kv.k.shape[-1] == size:
            return KV(fit(kv.k, -3, num_blocks), v)
        k = kv.k.swapaxes(-1, -2)  # [..., N, W, H], whose slots follow one another
        k = fit(k.reshape(*k.shape[:-3], -1, k.shape[-1]), -2, num_blocks * size)
        return KV(k.reshape(*k.shape[:-2], num_blocks, size, k.shape[-1]).swapaxes(-1, -2), v)

    kv = jax.tree.map(both, part.kv, is_leaf=lambda x: isinstance(x, KV))
    positions, valid = (fit(x, 1, num_blocks * size) for x in (part.positions, part.valid))
    return Part(kv, positions, valid)


def row(part: Part, index: jax.Array) -> Part:
    """The part of one row."""
    return _by_row(lambda axis, x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis), part)


def rows(part: Part, indices: jax.Array) -> Part:
    """The part of these rows."""
    return _by_row(lambda axis, x: jnp.take(x, indices, axis=axis), part)


def replace_row(part: Part, index: jax.Array, one: Part) -> Part:
    """The part with one row, of as many slots, in the place of another."""
    return _by_row(lambda axis, x, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, axis), part, one)


def append(part: Part, used: jax.Array, new: Part) -> Part:
    """The part with the one block of `new`, of as many rows, written in each row from slot `used` [P] on.

    Where the part has several blocks, it must fall within one of them.
    """
    axis = _row_axis(part)

    def key(x: jax.Array, y: jax.Array, used: jax.Array) -> jax.Array:
        start = [jnp.zeros((), used.dtype)] * x.ndim
        start[-3], start[-1] = used // x.shape[-1], used % x.shape[-1]
        return jax.lax.dynamic_update_slice(x, y, start)

    def value(x: jax.Array, y: jax.Array, used: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y, used, x.ndim - 2)

    def both(kv: KV, new: KV) -> KV:
        k, v = (jax.vmap(write, (axis, axis, 0), axis) for write in (key, value))
        return KV(k(kv.k, new.k, used), v(kv.v, new.v, used))

    def mark(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(x, y, used)

    kv = jax.tree.map(both, part.kv, new.kv, is_leaf=lambda x: isinstance(x, KV))
    return Part(kv, mark(part.positions, new.positions), mark(part.valid, new.valid))


def _by_row(change: Callable[..., jax.Array], part: Part, *others: Part) -> Part:
    """`change(row axis, leaf, leaves of the others)` of every leaf."""
    kv = jax.tree.map(partial(change, _row_axis(part)), part.kv, *(other.kv for other in others))
    of = [(each.positions, each.valid) for each in (part, *others)]
    return Part(kv, *(change(0, *leaves) for leaves in zip(*of, strict=True)))


def _row_axis(part: Part) -> int:
    """Of keys and values: before it lie the layers where they are scanned."""
    return 1 if isinstance(part.kv, KV) else 0
