"""The terms of the loss token by token, each [B, N]: surrogates of the reward and penalties on the KL to the base.

A surrogate takes log-probs [B, N] and an advantage a completion [B]. A penalty, in float32 nats, is one of:

| name           | penalty                                  | its gradient, over completions drawn from pi       |
|----------------|------------------------------------------|----------------------------------------------------|
| `base_adapted` | KL(base, pi), exact over the vocabulary  | its own; the public code of arXiv 2501.06252       |
| `adapted_base` | KL(pi, base), exact over the vocabulary  | its own, token by token                            |
| `k1`           | d = log pi(y) - log base(y)              | of KL(pi, base) over whole completions             |
| `k2`           | d^2 / 2                                  | of KL(pi, base), token by token                    |
| `k3`           | exp(-d) - 1 + d, never negative          | of KL(base, pi), token by token, not what it counts |

KL(p, q) is the mean of log p / q under p. k1, k2 and k3 are estimates of KL(pi, base) from the tokens drawn
(J. Schulman, "Approximating KL divergence", 2020); k1 and k3 are unbiased in value. Differentiated as they stand, k1
has a mean gradient of zero and k3 that of the other direction (arXiv 2506.09477), so that k1 here has the gradient of
a reward lowered by it, and k3, GRPO's, stays as it is used.
"""

import jax
import jax.numpy as jnp

from sva.generation.logprobs import Scores


def score_function(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A log pi(y): its gradient is REINFORCE's (Williams 1992), of completions drawn from pi itself.

    With A = 1 and given answers instead of drawn ones it is the next-token loss.
    """
    return -advantages[:, None] * logprobs


def clipped_ratio(
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
    unclipped = ratio * advantages[:, None]
    clipped = jnp.clip(ratio, 1 - low, 1 + high) * advantages[:, None]
    return -jnp.minimum(unclipped, clipped), clipped < unclipped


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """d = log pi - log base."""
    return logprobs - ref_logprobs


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """d^2 / 2."""
    return jnp.square(logprobs - ref_logprobs) / 2


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d."""
    d = logprobs - ref_logprobs
    return jnp.expm1(-d) + d


def penalty(scores: Scores, keep: jax.Array, kind: str) -> jax.Array:
    """The penalty named `kind` (one of `config.reinforce.PENALTIES`) of each token; masked ones hold anything finite.

    Args:
      keep: [B, N] float32, 1 for the tokens that count; k1's gradient sums over those of a row.
    """
    if kind == "base_adapted":
        return scores.kl
    if kind == "adapted_base":
        return scores.reverse_kl
    if kind == "k1":
        d = jax.lax.stop_gradient(k1(scores.logprobs, scores.ref_logprobs))
        of_row = jnp.sum(d * keep, axis=1, keepdims=True)
        return d + of_row * (scores.logprobs - jax.lax.stop_gradient(scores.logprobs))
    return {"k2": k2, "k3": k3}[kind](scores.logprobs, scores.ref_logprobs)
