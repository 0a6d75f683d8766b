"""Advantages: what a completion's reward is worth, from rewards [P, G] of G samples of each of P prompts.

| name            | advantage                                              | source                                    |
|-----------------|--------------------------------------------------------|-------------------------------------------|
| `none`          | the reward itself                                      | Transformer-Squared, arXiv 2501.06252     |
| `leave_one_out` | minus the mean of the prompt's other samples           | RLOO, arXiv 2402.14740                    |
| `mean`          | minus the mean of the prompt's samples                 | Dr. GRPO, arXiv 2503.20783, section 3.1   |
| `group`         | the same, divided by the prompt's standard deviation   | GRPO, arXiv 2402.03300, section 4.1       |
| `batch`         | mean and deviation of all samples of all prompts       | REINFORCE++, arXiv 2501.03262             |

In expectation `none` and `leave_one_out` give the gradient of the mean reward, and `mean` (G - 1) / G of it, because
a sample's own reward is in its baseline; the other two weigh prompts by how much their samples disagree. All are
[P, G] float32, unitless.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def none(rewards: jax.Array) -> jax.Array:
    """The rewards."""
    return rewards


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """Rewards minus the mean of the same prompt's other samples; G is at least 2."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * (samples / (samples - 1))


def mean(rewards: jax.Array) -> jax.Array:
    """Rewards minus the mean of the same prompt's samples."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def group(rewards: jax.Array) -> jax.Array:
    """Rewards standardised prompt by prompt; samples that are all equal teach nothing and get 0."""
    return _standardised(rewards, 1)


def batch(rewards: jax.Array) -> jax.Array:
    """Rewards standardised over all samples of all prompts.

    A policy that always gives the same answer still learns where it is wrong, which a classifier that collapsed onto
    one label would otherwise never do.
    """
    return _standardised(rewards, None)


def _standardised(rewards: jax.Array, axis: int | None) -> jax.Array:
    centred = rewards - rewards.mean(axis=axis, keepdims=True)
    spread = rewards.std(axis=axis, keepdims=True)
    return jnp.where(spread > 0, centred / jnp.where(spread > 0, spread, 1.0), 0.0)


BASELINES: dict[str, Callable[[jax.Array], jax.Array]] = {
    fn.__name__: fn for fn in (none, leave_one_out, mean, group, batch)
}
