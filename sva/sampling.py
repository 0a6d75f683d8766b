"""Next-token strategies: small frozen dataclasses, hashable, so static under jit.

Each is called as `strategy(logits, keys)` with float32 logits [B, V] and one key a row, [B]; a row's token depends on
its own logits and key alone. All return token ids [B] int32.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from sva.errors import UserError


class Sampling(Protocol):
    """A next-token strategy."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B] from logits [B, V] and keys [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; the lower id among equals."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]; the keys are not used."""
        return _argmax(logits)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        return _draw(logits / self.temperature, keys)


@dataclasses.dataclass(frozen=True)
class TopP:
    """A draw from the smallest set of tokens whose probability reaches `p` (nucleus sampling, arXiv 1904.09751)."""

    p: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        if not 0 < self.p <= 1:
            raise UserError(f"top_p={self.p} is outside (0, 1]; 1 keeps every token, and Greedy() the likeliest alone")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        logits = logits / self.temperature
        if self.p == 1:  # rounding lets the cumulated mass reach 1 before the last token
            return _draw(logits, keys)
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of likelier tokens; of equals at the edge, all are kept
        least = jnp.min(jnp.where(before < self.p, ranked, jnp.inf), axis=-1, keepdims=True)
        return _draw(jnp.where(logits >= least, logits, -jnp.inf), keys)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, key: jax.random.categorical(key, row))(logits, keys).astype(jnp.int32)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name}={value} must be above 0; for the likeliest token use Greedy()")


def _argmax(logits: jax.Array, block: int = 128) -> jax.Array:
    """`jnp.argmax` over the last axis of [B, V] as [B] int32: the best block first, then the best inside it.

    XLA's CPU arg-max is one scalar loop, 10 to 20 times as slow as its maximum; this way it runs over V / 128 numbers.
    """
    rows, size = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -size % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, block)
    best = jnp.argmax(blocks.max(axis=-1), axis=-1)
    inside = jnp.argmax(jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0], axis=-1)
    return (best * block + inside).astype(jnp.int32)
