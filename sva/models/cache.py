"""The key/value cache as a pytree of fixed shape."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.models.config import ModelConfig


class KV(NamedTuple):
    """One layer's keys and values, of K heads of width H. Keys lie as the product with a query reads them."""

    k: Any  # [B, K, H, S]
    v: Any  # [B, K, S, H]


@struct.dataclass
class Cache:
    """Keys and values of S slots for B rows, and which slots hold a token.

    All rows write the same slots, so prompts are padded on the left. Layers are a leading axis where the model scans
    them, a tuple where it does not.
    """

    kv: Any  # a KV a layer, in a tuple; scanned: one KV of [L, ...]
    positions: jax.Array  # [B, S] int32, each slot's position in its row
    valid: jax.Array  # [B, S] bool, False for padding and for slots not yet written
    index: jax.Array  # [] int32, the next slot to write


def init(cfg: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, *, scan: bool) -> Cache:
    """An empty cache of `slots` slots for `batch` rows."""

    def layer(*lead: int) -> KV:
        k = jnp.zeros((*lead, batch, cfg.num_kv_heads, cfg.head_dim, slots), dtype)
        return KV(k, jnp.zeros((*lead, batch, cfg.num_kv_heads, slots, cfg.head_dim), dtype))

    return Cache(
        kv=layer(cfg.num_layers) if scan else tuple(layer() for _ in range(cfg.num_layers)),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        index=jnp.zeros((), jnp.int32),
    )


def extend(cache: Cache, positions: jax.Array, valid: jax.Array) -> Cache:
    """The cache with T new slots marked as written (`positions`, `valid` are [B, T]); the model writes their values."""
    start = (jnp.zeros((), jnp.int32), cache.index)
    return dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, start),
        index=cache.index + positions.shape[1],
    )


def repeat(cache: Cache, rows: int) -> Cache:
    """The cache with each row `rows` times in a run, [B * rows, ...]: one prompt read by many samples."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, rows, axis=x.ndim - 4)

    return dataclasses.replace(
        cache,
        kv=jax.tree.map(spread, cache.kv),
        positions=jnp.repeat(cache.positions, rows, axis=0),
        valid=jnp.repeat(cache.valid, rows, axis=0),
    )


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with `slots` free slots more at its end."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots if i == axis % x.ndim else 0) for i in range(x.ndim)])

    return dataclasses.replace(
        cache,
        kv=jax.tree.map(lambda kv: KV(pad(kv.k, -1), pad(kv.v, -2)), cache.kv, is_leaf=lambda x: isinstance(x, KV)),
        positions=pad(cache.positions, 1),
        valid=pad(cache.valid, 1),
    )
