"""IA3 (arXiv 2205.05638), as PEFT has it: W' = diag(l) W, and of down_proj W' = W diag(l), from l = 1.

D_out numbers are trained of a matrix, D_in of down_proj. Its own targets are k_proj, v_proj and down_proj
(`targets=ia3`); others are scaled at their outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters.family import Adapter, Matrix, PerMatrix, lead
from sva.utils.matmul import dot

FEED_FORWARD = ("down_proj",)  # whose inputs are scaled


@struct.dataclass
class Outputs(Adapter):
    """l * (x W^T + b)."""

    factors: jax.Array  # [D_out] float32
    bias: Any = None  # [D_out], the layer's own

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`."""
        factors = self.factors[None, None, :].astype(x.dtype)
        y = dot(x, w) * factors
        return y if self.bias is None else y + (factors - 1) * self.bias[None, None, :].astype(x.dtype)

    def merge(self, w: jax.Array) -> jax.Array:
        """diag(l) W."""
        return self.factors[:, None] * w

    def merged_bias(self) -> jax.Array | None:
        """l * b."""
        return None if self.bias is None else (self.factors * self.bias).astype(self.bias.dtype)


@struct.dataclass
class Inputs(Adapter):
    """(l * x) W^T."""

    factors: jax.Array  # [D_in] float32

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`."""
        return dot(x * self.factors[None, None, :].astype(x.dtype), w)

    def merge(self, w: jax.Array) -> jax.Array:
        """W diag(l)."""
        return w * self.factors[None, :]


@dataclasses.dataclass(frozen=True)
class IA3(PerMatrix):
    """Factors of a weight's outputs or inputs, from ones."""

    name = "ia3"
    centre = 1.0
    reads = ("bias",)

    def first(self, info: Matrix) -> jax.Array:
        """Ones [D_out], or [D_in]."""
        return jnp.ones((*lead(info), info.shape[info.kind in FEED_FORWARD]), jnp.float32)

    def one_z(self, raw: Any, info: Matrix) -> Outputs | Inputs:
        """The adapter of the factors."""
        factors = raw.astype(jnp.float32)
        return Inputs(factors) if info.kind in FEED_FORWARD else Outputs(factors, info.bias)
