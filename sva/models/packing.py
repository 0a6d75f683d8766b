"""Tokens of a padded batch without its padding: what every layer but attention computes, for tokens do not meet there.

batch:    [ . . a b c ]      packed:  [ a b c d e f g h ... ]      N of B * T tokens
          [ . d e f g ]
          [ . . . . h ]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
    """Indices of the N packed tokens of a batch [B, T], and back."""

    token_indices: jax.Array  # [N] int32, row * T + column of each; one is repeated where there are fewer than N
    packed_indices: jax.Array  # [B, T] int32, which of the N each token is; anything for padding


def packing(token_indices: jax.Array, batch: int, length: int) -> Packing:
    """The packing of the tokens at `token_indices` [N]."""
    numbers = jnp.arange(len(token_indices), dtype=jnp.int32)
    packed_indices = jnp.zeros(batch * length, jnp.int32).at[token_indices].set(numbers)
    return Packing(token_indices, packed_indices.reshape(batch, length))


def pack(x: jax.Array, packing: Packing | None) -> jax.Array:
    """[1, N, ...] of x [B, T, ...]; x itself without a packing."""
    if packing is None:
        return x
    return jnp.take(x.reshape(-1, *x.shape[2:]), packing.token_indices, axis=0, mode="clip")[None]


def unpack(x: jax.Array, packing: Packing | None) -> jax.Array:
    """[B, T, ...] of x [1, N, ...], where padding holds another token's; x itself without a packing."""
    return x if packing is None else jnp.take(x[0], packing.packed_indices, axis=0, mode="clip")
