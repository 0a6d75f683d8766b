"""Next-token strategies: small frozen dataclasses, hashable, so static under jit.

Each is called as `strategy(logits, keys)` with float32 logits [B, V] and one key a row, [B]; a row's token depends on
its own logits and key alone. All return token ids [B] int32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sva.generation.temperature import check_temperature
from sva.utils.errors import UserError


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
        return likeliest(logits)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        return gumbel_draw(logits / self.temperature, keys)


@dataclasses.dataclass(frozen=True)
class OnPolicy(Temperature):
    """`Temperature`, for training: the log-probs that go with a token are those of softmax(logits / temperature).

    A policy gradient, its clipped ratio and the gap between sampler and trainer are about the policy that drew; every
    other strategy's tokens come with the model's own log-probs, before temperature and cut.
    """


def reported(sampling: object, logits: jax.Array) -> jax.Array:
    """The logits whose log-softmax a generation reports: the model's own; for `OnPolicy` those that it drew from."""
    return logits / sampling.temperature if isinstance(sampling, OnPolicy) else logits


@dataclasses.dataclass(frozen=True)
class TopP:
    """A draw from the smallest set of tokens whose probability reaches `p` (nucleus sampling, arXiv 1904.09751)."""

    p: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        if not 0 < self.p <= 1:
            raise UserError(f"top_p={self.p} is outside (0, 1]; 1 keeps every token, temperature 0 the likeliest one")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        logits = logits / self.temperature
        if self.p == 1:  # rounding lets the mass reach 1 before the last token
            return gumbel_draw(logits, keys)
        probs = jax.nn.softmax(logits, axis=-1)
        least = least_kept(logits, lambda likelier: jnp.sum(jnp.where(likelier, probs, 0.0), axis=-1) < self.p)
        return gumbel_draw(jnp.where(logits >= least, logits, -jnp.inf), keys)


@dataclasses.dataclass(frozen=True)
class TopK:
    """A draw from the `k` likeliest tokens (arXiv 1805.04833); of equals at the edge, all are kept."""

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        if self.k < 1:
            raise UserError(f"top_k={self.k} must be at least 1; leave it out to keep every token")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        logits = logits / self.temperature
        least = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return gumbel_draw(jnp.where(logits >= least, logits, -jnp.inf), keys)


@dataclasses.dataclass(frozen=True)
class MinP:
    """A draw from the tokens at least `p` times as probable as the likeliest (arXiv 2407.01082)."""

    p: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        if not 0 < self.p <= 1:
            raise UserError(f"min_p={self.p} is outside (0, 1]; Temperature() keeps every token")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids [B]."""
        logits = logits / self.temperature
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(self.p)
        return gumbel_draw(jnp.where(logits >= least, logits, -jnp.inf), keys)


def strategy(
    temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampling:
    """The strategy of these settings: greedy without any or at temperature 0; one cut at most.

    Raises:
      UserError: a value out of range, or two cuts.
    """
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = [name for name, value in cuts.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are two ways to cut the distribution; choose one")
    if temperature is not None and not temperature >= 0:
        raise UserError(f"temperature={temperature} must be above 0, or 0 for the likeliest token")
    if temperature == 0 or (temperature is None and not given):
        return Greedy()
    heat = 1.0 if temperature is None else temperature
    if top_k is not None:
        return TopK(top_k, heat)
    if top_p is not None:
        return TopP(top_p, heat)
    return Temperature(heat) if min_p is None else MinP(min_p, heat)


def least_kept(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B, 1], the least logit such that `enough` is true of the mask [B, V] of greater ones.

    Fewer logits are greater than a greater one, and of fewer it stays true. By bisection over the numbers that 32
    bits can hold: exact, and unlike sorting parallel.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers they compare as the floats do

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        holds = enough(order > middle[:, None])
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    bounds = jnp.min(order, axis=-1) - 1, jnp.max(order, axis=-1)
    _, least = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.min(jnp.where(order >= least[:, None], logits, jnp.inf), axis=-1, keepdims=True)


def gumbel_draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """`jax.random.categorical` of each row: the arg-max of its logits and Gumbel noise."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return likeliest(logits + noise)


def likeliest(logits: jax.Array, block: int = 128) -> jax.Array:
    """`jnp.argmax` over the last axis of [B, V] as [B] int32: the best block first, then the best inside it.

    XLA's CPU arg-max is one scalar loop, 10 to 20 times as slow as its maximum; this way it runs over V / 128 numbers.
    The vocabulary is taken as the leading axis, which is how the product leaves it there.
    """
    size, rows = logits.shape[::-1]
    padded = jnp.pad(logits.T, ((0, -size % block), (0, 0)), constant_values=-jnp.inf)
    blocks = padded.reshape(-1, block, rows)
    best = jnp.argmax(blocks.max(axis=1), axis=0)
    inside = jnp.argmax(blocks[best, :, jnp.arange(rows)], axis=-1)
    return (best * block + inside).astype(jnp.int32)
