"""Keys and values of tokens read so far, as parts of fixed shape.

A batch attends to a sequence of parts, each written once and then only read, and to the tokens of the call itself. A
part may have fewer rows than the batch: an instruction that all rows share has one, the prompts of G samples each have
one for G rows. What is generated goes into the slots of `Recent`, one call after another.

    past:    [ instruction, 1 row ] [ prompts, P rows ]      recent:  [ generated, B rows ... free slots ]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.models.config import ModelConfig


class KV(NamedTuple):
    """One layer's keys and values, of K heads of width H. Keys lie as the product with a query reads them."""

    k: Any  # [P, K, H, S]
    v: Any  # [P, K, S, H]


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


def empty(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: bool) -> Part:
    """A part of `slots` slots for `rows` rows in which nothing is written."""

    def layer(*lead: int) -> KV:
        k = jnp.zeros((*lead, rows, cfg.num_kv_heads, cfg.head_dim, slots), dtype)
        return KV(k, jnp.zeros((*lead, rows, cfg.num_kv_heads, slots, cfg.head_dim), dtype))

    return Part(
        kv=layer(cfg.num_layers) if scan else tuple(layer() for _ in range(cfg.num_layers)),
        positions=jnp.zeros((rows, slots), jnp.int32),
        valid=jnp.zeros((rows, slots), bool),
    )


def start(cfg: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, *, scan: bool) -> Recent:
    """So many free slots for `rows` rows, to be filled from the first on."""
    return Recent(empty(cfg, rows, slots, dtype, scan=scan), jnp.zeros((), jnp.int32))


def mark(recent: Recent, positions: jax.Array, valid: jax.Array) -> Part:
    """The part with its next T slots said to be written (`positions`, `valid` are [B, T]); the model writes them."""
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
    """The part with so many slots: free ones added at its end, or the last ones dropped."""
    more = slots - part.valid.shape[1]

    def fit(x: jax.Array, axis: int) -> jax.Array:
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, slots, axis=axis)
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])

    def both(kv: KV) -> KV:
        return KV(fit(kv.k, -1), fit(kv.v, -2))

    kv = jax.tree.map(both, part.kv, is_leaf=lambda x: isinstance(x, KV))
    return Part(kv, fit(part.positions, 1), fit(part.valid, 1))


def row(part: Part, index: jax.Array) -> Part:
    """The part of one row."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, _row_axis(x)), part)


def rows(part: Part, indices: jax.Array) -> Part:
    """The part of these rows."""
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=_row_axis(x)), part)


def replace_row(part: Part, index: jax.Array, one: Part) -> Part:
    """The part with one row, of as many slots, in the place of another."""

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y, index, _row_axis(x))

    return jax.tree.map(put, part, one)


def append(part: Part, used: jax.Array, new: Part) -> Part:
    """The part with the slots of `new`, of as many rows, written in each row from slot `used` [P] on."""

    def write(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
        rows, update = _row_axis(x), jax.lax.dynamic_update_slice_in_dim
        return jax.vmap(lambda x, y, at: update(x, y, at, axis), (rows, rows, 0), rows)(x, y, used)

    def both(kv: KV, new: KV) -> KV:
        return KV(write(-1, kv.k, new.k), write(-2, kv.v, new.v))

    kv = jax.tree.map(both, part.kv, new.kv, is_leaf=lambda x: isinstance(x, KV))
    return Part(kv, write(-1, part.positions, new.positions), write(-1, part.valid, new.valid))


def _row_axis(x: jax.Array) -> int:
    """Of a leaf of a part: keys and values have four axes, and layers before them where they are scanned."""
    return max(x.ndim - 4, 0)
