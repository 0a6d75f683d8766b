"""Numbers that a weight's name fixes for ever: the same with every version of JAX, on every device and mesh."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seed_of(name: str) -> np.uint32:
    """The number of a weight's own: the first four bytes of the sha256 of its name."""
    return np.uint32(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))


def uniform(seed: Any, shape: tuple[int, ...], bound: float) -> jax.Array:
    """[..., *shape] float32 numbers, uniform in (-bound, bound), fixed by seed [...] uint32."""
    seed = jnp.asarray(seed, jnp.uint32)
    places = spread(jnp.arange(np.prod(shape), dtype=jnp.uint32))
    mixed = spread(seed.reshape(*seed.shape, 1) ^ places.reshape(*(1,) * seed.ndim, -1))
    # Odd integers in (-2^24, 2^24), exact in float32; the one product after them rounds alike everywhere.
    odd = (mixed >> 8).astype(jnp.int32) * 2 + (1 - 2**24)
    return (odd.astype(jnp.float32) * np.float32(bound / 2**24)).reshape(*seed.shape, *shape)


def spread(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
