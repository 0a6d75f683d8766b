"""Tokens of a padded batch without its padding: what every layer but attention computes, for tokens do not meet there.

places:   [ . . a b c ]      packed:  [ a b c d e f g h ... ]      N of B * T places
          [ . d e f g ]
          [ . . . . h ]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
    """Where the N packed tokens of a batch [B, T] lie."""

    places: jax.Array  # [N] int32, row * T + column of each; any place twice where there are fewer than N
    at: jax.Array  # [B, T] int32, which of the N lies there; for a place without one any


def packing(places: jax.Array, batch: int, length: int) -> Packing:
    """The packing of the tokens at `places` [N]."""
    at = jnp.zeros(batch * length, jnp.int32).at[places].set(jnp.arange(len(places), dtype=jnp.int32))
    return Packing(places, at.reshape(batch, length))


def pack(x: jax.Array, packing: Packing | None) -> jax.Array:
    """[1, N, ...] of x [B, T, ...]; x itself without a packing."""
    if packing is None:
        return x
    return jnp.take(x.reshape(-1, *x.shape[2:]), packing.places, axis=0, mode="clip")[None]


def unpack(x: jax.Array, packing: Packing | None) -> jax.Array:
    """[B, T, ...] of x [1, N, ...], where a place without a token holds another's; x itself without a packing."""
    return x if packing is None else jnp.take(x[0], packing.at, axis=0, mode="clip")
