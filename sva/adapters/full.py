"""Full fine-tuning of the target weights, as a change of W's own shape: W' = W + D, from D = 0.

Its gradient and its optimiser's state are as large as the weights, so that `checkpoint.every` should be more than 1.
Embeddings and norms stay frozen, as everywhere.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters.family import Adapter, Matrix, PerMatrix, lead
from sva.utils.matmul import dot, floats


@struct.dataclass
class Dense(Adapter):
    """x (W + D)^T; the sum is rounded to the dtype of x."""

    change: jax.Array  # [D_out, D_in] float32

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`."""
        return dot(x, self.merge(floats(w, jnp.float32).astype(jnp.float32)).astype(x.dtype))

    def merge(self, w: jax.Array) -> jax.Array:
        """W + D."""
        return w + self.change


@dataclasses.dataclass(frozen=True)
class Full(PerMatrix):
    """D itself is trained."""

    name = "full"
    reads = ()
    sides = {"": ("out", "in")}

    def first(self, info: Matrix) -> jax.Array:
        """Zeros [D_out, D_in]."""
        return jnp.zeros((*lead(info), *info.shape), jnp.float32)

    def one_z(self, raw: Any, info: Matrix) -> Dense:
        """The adapter of D."""
        del info
        return Dense(raw.astype(jnp.float32))
