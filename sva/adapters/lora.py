"""LoRA, rsLoRA and DoRA: a product of two thin matrices added to a weight.

| spelt                  | weight                                           | source           |
|------------------------|--------------------------------------------------|------------------|
| `lora:r=16,alpha=32`   | W + (alpha / r) B A                              | arXiv 2106.09685 |
| `rslora:r=16,alpha=32` | W + (alpha / sqrt r) B A                         | arXiv 2312.03732 |
| `dora:r=16,alpha=32`   | the rows of W + (alpha / r) B A, made m long     | arXiv 2402.09353 |

r (D_in + D_out) numbers are trained of a matrix, and of DoRA the D_out of m.

Initialised and scaled as in PEFT: A uniform within 1 / sqrt(D_in), B zeros, m the lengths of W's rows, so that every
one starts at the base. `dropout` is of the inputs of A, in training alone; each update draws anew, from (seed, step).
Deviation: A comes from a hash of the weight's name and the run's seed, not from a library's generator.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters.draws import spread, uniform
from sva.adapters.family import Adapter, Matrix, PerMatrix, is_info, lead, require_rank
from sva.utils.matmul import dot, floats


@struct.dataclass
class LowRank(Adapter):
    """x W^T + scale (x A^T) B^T; neither forwards nor backwards is there an array of W's shape."""

    a: jax.Array  # [r, D_in] float32
    b: jax.Array  # [D_out, r] float32
    scale: float = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False, default=0.0)  # of dropout
    noise: Any = None  # [] uint32, the seed of its draws; None: nothing is dropped

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`."""
        return dot(x, w) + self.change(self.dropped(x))

    def change(self, x: jax.Array) -> jax.Array:
        """[B, T, D_out] of the inputs of A."""
        return dot(dot(x, self.a.astype(x.dtype)) * self.scale, self.b.astype(x.dtype))

    def dropped(self, x: jax.Array) -> jax.Array:
        """x with a part of its numbers set to zero and the rest made larger, in training."""
        if self.noise is None:
            return x
        # Rows and length enter, so that the prompts' pass and the completions' draw apart (unless both have as many).
        # Hashed: JAX's generator in every layer of an unrolled model would take longer to compile than all the rest.
        noise = self.noise ^ spread(spread(jnp.uint32(x.shape[0])) ^ jnp.uint32(x.shape[1]))
        keep = uniform(noise, x.shape, 1.0) < 1 - 2 * self.rate
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))

    def merge(self, w: jax.Array) -> jax.Array:
        """W + scale B A."""
        return w + self.scale * jnp.matmul(self.b, self.a, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class LoRA(PerMatrix):
    """W + (alpha / r) B A; raw values of a weight are {"a": A [r, D_in], "b": B [D_out, r]}."""

    r: int
    alpha: float
    dropout: float = 0.0

    name = "lora"
    reads = ()
    sides = {"a": (None, "in"), "b": ("out", None)}

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.r

    def first(self, info: Matrix) -> dict[str, jax.Array]:
        """A drawn, B zeros."""
        require_rank(self, self.r, info)
        out, into = info.shape
        a = uniform(info.seed, (self.r, into), into**-0.5)
        return {"a": a, "b": jnp.zeros((*lead(info), out, self.r), jnp.float32)}

    def one_z(self, raw: Any, info: Matrix) -> LowRank:
        """The adapter of A and B."""
        del info
        a, b = (raw[part].astype(jnp.float32) for part in ("a", "b"))
        return LowRank(a, b, self.scale, self.dropout)

    @property
    def has_noise(self) -> bool:
        """Whether it has dropout."""
        return self.dropout > 0

    def noisy(self, z: Any, infos: Any, seed: jax.Array) -> Any:
        """z with a seed for each matrix's dropout."""

        def one(info: Matrix, z: Any) -> Any:
            return z.replace(noise=spread(jnp.asarray(info.seed, jnp.uint32) ^ spread(seed)))

        return jax.tree.map(one, infos, z, is_leaf=is_info)


@dataclasses.dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA whose scale falls with the root of the rank, so that high ranks learn as fast as low ones."""

    name = "rslora"

    @property
    def scale(self) -> float:
        """alpha / sqrt(r)."""
        return self.alpha / math.sqrt(self.r)


@struct.dataclass
class Directed(LowRank):
    """m * (x V^T) / norms of V's rows, V = W + scale B A; the norms are constants of the gradient (section 4.3).

    The norms come from W A^T and A A^T, so that V is not formed.
    """

    magnitude: Any = None  # [D_out] float32

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`. As in PEFT, dropout is of both products' inputs but not of the base's own."""
        ratio = (self.magnitude / self._norms(w))[None, None, :]
        base, dropped = dot(x, w), self.dropped(x)
        product = base if dropped is x else dot(dropped, w)
        change = (ratio - 1).astype(x.dtype) * product + ratio.astype(x.dtype) * self.change(dropped)
        return base + change

    def _norms(self, w: Any) -> jax.Array:
        """[D_out] float32, without a gradient."""
        w, a = floats(w, jnp.float32).astype(jnp.float32), self.a
        b = self.scale * self.b
        both = 2 * jnp.sum(dot(w, a) * b, axis=1) + jnp.sum(dot(b, dot(a, a)) * b, axis=1)
        return jax.lax.stop_gradient(jnp.sqrt(jnp.sum(w * w, axis=1) + both))

    def merge(self, w: jax.Array) -> jax.Array:
        """m * V / norms."""
        return (self.magnitude / self._norms(w))[:, None] * super().merge(w)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the directions of W's rows, beside their lengths: raw values also have "magnitude" [D_out]."""

    name = "dora"
    reads = ("norms",)

    def first(self, info: Matrix) -> dict[str, jax.Array]:
        """As LoRA's, and the lengths of W's rows."""
        return super().first(info) | {"magnitude": jnp.asarray(info.norms, jnp.float32)}

    def one_z(self, raw: Any, info: Matrix) -> Directed:
        """The adapter of A, B and the lengths."""
        plain = super().one_z(raw, info)
        return Directed(plain.a, plain.b, plain.scale, plain.rate, None, raw["magnitude"].astype(jnp.float32))
