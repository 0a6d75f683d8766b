"""A population of z on the same prompts, all of them in one batch: every row its own z."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva import chat
from sva.errors import UserError
from sva.lm import LM
from sva.rollout import faults, prompts
from sva.spectral.family import Family
from sva.spectral.members import Diagonal, Site
from sva.tasks.base import Example, Task


class Answers(NamedTuple):
    """Greedy answers of M members to Q prompts, M * Q rows; row r is member r // Q's answer to prompt r % Q."""

    texts: list[str]
    mean_logprobs: np.ndarray  # [M, Q] float32 nats, mean over an answer's tokens
    lengths: np.ndarray  # [M * Q] int32
    overlong: int
    empty: int


def check_rows(family: Family) -> None:
    """Raises UserError for a parametrisation that no single row can have."""
    if not isinstance(family, Diagonal):
        raise UserError(
            f"train.method=evolution gives every row a z of its own, and {family} is no z; use linear, "
            "sigmoid_nuclear, top_k or tail_only"
        )


def answer(
    lm: LM,
    population: Mapping[str, jax.Array],
    places: Mapping[str, Site],
    family: Family,
    task: Task,
    examples: Sequence[Example],
    width: int,
    max_new_tokens: int,
) -> Answers:
    """Every member's greedy answers to the same prompts.

    Args:
      population: raw values {name: [M, ...]}.
      width: of the prompts, from `rollout.prompt_width`.
    """
    members = len(next(iter(population.values())))
    ids, mask = prompts(lm, task, examples, width)
    z = _rows_of_z(population, places, family, len(examples))
    eos = chat.end_tokens(lm)
    out = lm.generate(np.tile(ids, (members, 1)), np.tile(mask, (members, 1)), max_new_tokens, eos, z=z)
    texts = chat.decode(lm, out.tokens, out.lengths)
    means = (out.logprobs.sum(axis=1) / out.lengths).reshape(members, -1)
    return Answers(texts, means, out.lengths, *faults(out.tokens, out.lengths, texts, eos))


@partial(jax.jit, static_argnames=("family", "repeats"))
def _rows_of_z(population: Any, places: Mapping[str, Site], family: Family, repeats: int) -> dict[str, jax.Array]:
    z = jax.vmap(family.middles, in_axes=(0, None))(population, places)
    return {name: jnp.repeat(x, repeats, axis=0) for name, x in z.items()}


def likelihood_of_right(rewards: np.ndarray, mean_logprobs: np.ndarray) -> np.ndarray:
    """[M] what decides between members of equal fitness: the mean log-likelihood of a member's right answers.

    As in Transformer-Squared's public code; there a member with nothing right has 0, the best there is, here the least.
    """
    right = rewards > 0
    total = np.where(right, mean_logprobs, 0).sum(axis=1)
    return np.where(right.any(axis=1), total / np.maximum(right.sum(axis=1), 1), -np.inf).astype(np.float32)
