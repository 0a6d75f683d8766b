"""KL divergence of the adapted model to the base as a penalty, token by token: [B, N] float32, nats.

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
