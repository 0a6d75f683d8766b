"""A next-token strategy whose settings every row brings, so that rows of many requests decode in one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation.sampling import gumbel_draw, least_kept, likeliest

LIKELIEST = 20  # alternatives that a token may be reported with
BIASED = 64  # tokens whose logits a row may change


@struct.dataclass
class RowSettings:
    """The settings of B rows; see `row_settings` for one."""

    temperature: Any  # [B] float32; 0 for the likeliest token
    top_k: Any  # [B] int32; 0 keeps every token
    top_p: Any  # [B] float32; 1 keeps every token
    min_p: Any  # [B] float32; 0 keeps every token
    bias_ids: Any  # [B, BIASED] int32
    bias: Any  # [B, BIASED] float32, added to these logits; 0 where unused


def row_settings(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: tuple[tuple[int, float], ...] = (),
) -> RowSettings:
    """The settings of one row, as host arrays [1] and [1, BIASED].

    Args:
      bias: at most `BIASED` pairs of a token id and what is added to its logit.
    """
    ids, values = np.zeros((1, BIASED), np.int32), np.zeros((1, BIASED), np.float32)
    for place, (token, value) in enumerate(bias):
        ids[0, place], values[0, place] = token, value
    numbers = [np.asarray([x], np.float32) for x in (temperature, top_p, min_p)]
    return RowSettings(numbers[0], np.asarray([top_k], np.int32), numbers[1], numbers[2], ids, values)


@dataclasses.dataclass(frozen=True)
class PerRow:
    """Each row's own temperature and cuts; of several cuts a token must pass all.

    A row draws what `Greedy`, `Temperature`, `TopK`, `TopP` or `MinP` draws from the same logits with the same key, up
    to rounding. Noise is drawn, and cuts are found, only in steps in which some row wants them.

    With `is_rich` the rows' biases are added, and the `LIKELIEST` tokens are reported beside the one drawn.
    """

    is_rich: bool = False

    @property
    def likeliest(self) -> int:
        """How many alternatives are reported."""
        return LIKELIEST if self.is_rich else 0

    def __call__(self, logits: jax.Array, keys: jax.Array, rows: RowSettings) -> jax.Array:
        """Token ids [B] int32 from logits [B, V], one key a row [B] and the settings of B rows."""
        if self.is_rich:
            logits = logits.at[jnp.arange(len(logits))[:, None], rows.bias_ids].add(rows.bias)
        hot = rows.temperature > 0
        logits = logits / jnp.where(hot, rows.temperature, 1)[:, None]
        cuts = hot & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
        logits = jax.lax.cond(cuts.any(), _cut, lambda x, _: x, logits, rows)
        return jax.lax.cond(hot.any(), _drawn, lambda x, *_: likeliest(x), logits, keys, hot)


def _drawn(logits: jax.Array, keys: jax.Array, hot: jax.Array) -> jax.Array:
    return jnp.where(hot, gumbel_draw(logits, keys), likeliest(logits))


def _cut(logits: jax.Array, rows: RowSettings) -> jax.Array:
    """The logits [B, V], minus infinity where a cut of the row takes the token away."""
    probs = jax.nn.softmax(logits, axis=-1)
    mass = jnp.where(rows.top_p < 1, rows.top_p, 2.0)
    count = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1])

    def enough(likelier: jax.Array) -> jax.Array:
        within = jnp.sum(jnp.where(likelier, probs, 0.0), axis=-1) < mass
        return within & (jnp.sum(likelier, axis=-1) < count)

    least = least_kept(logits, enough)
    least = jnp.maximum(least, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None])
    return jnp.where(logits >= least, logits, -jnp.inf)
