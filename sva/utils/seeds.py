"""Seeds: which numbers may be one, and the random key that each of them makes."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from sva.utils.errors import UserError

if TYPE_CHECKING:
    import jax

LARGEST = 2**64 - 1


def check(name: str, seed: Any) -> None:
    """Raises UserError, which calls the setting `name`, unless `seed` is a whole number from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) <= LARGEST:
        raise UserError(f"{name}={seed} is not a seed; give a whole number from 0 to {LARGEST} (2^64 - 1)")


def key(seed: int) -> jax.Array:
    """A typed random key of the seed's own.

    `jax.random.key` keeps 32 bits of a seed, so that 2^32 would draw what 0 draws; with 64-bit types it keeps them all.
    Below 2^32 both give the same key.

    Raises:
      UserError: a seed that is negative, too large or not a whole number.
    """
    import jax  # not above: settings, which hold seeds, are checked without JAX
    import numpy as np

    check("seed", seed)
    if seed < 2**32:
        return jax.random.key(int(seed))
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))


def of_rows(key: jax.Array, numbers: Any) -> jax.Array:
    """[n] typed keys, `key` folded with each of the n row numbers: what a row draws depends on no other row."""
    import jax

    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.asarray(numbers))
