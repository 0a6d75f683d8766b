"""Losses token by token: each [B, N] float32, from log-probs [B, N] and an advantage a completion [B]."""

import jax
import jax.numpy as jnp


def score_function(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A log pi(y): its gradient is REINFORCE's (Williams 1992), of completions drawn from pi itself.

    With A = 1 and given answers instead of drawn ones it is the next-token loss.
    """
    return -advantages[:, None] * logprobs


def clipped(
    logprobs: jax.Array, sampled: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """(loss, is_clipped): -min(ratio A, clip(ratio, 1 - low, 1 + high) A), and where the clip stopped the gradient.

    PPO (arXiv 1707.06347, equation 7) with ratio = pi(y) / pi_sampled(y) of each token, against the policy that drew
    the completions; `high` over `low` as in DAPO (arXiv 2503.14476, section 3.1). At a ratio of 1 its gradient is
    that of `score_function`.

    Args:
      sampled: [B, N] log-probs under the policy that drew, nats.
      low, high: how far the ratio may fall below and rise above 1.
    """
    ratio = jnp.exp(logprobs - sampled)
    free = ratio * advantages[:, None]
    held = jnp.clip(ratio, 1 - low, 1 + high) * advantages[:, None]
    return -jnp.minimum(free, held), held < free
