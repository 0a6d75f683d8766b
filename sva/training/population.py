"""A population of z on the same prompts, all of them in one batch: every row its own z."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation import chat, population_batch
from sva.generation.lm import LM
from sva.generation.population_batch import PaddedShape
from sva.generation.sampling import Greedy
from sva.tasks.base import Example, Task


class Answers(NamedTuple):
    """Greedy answers of M members to Q prompts, M * Q rows; row r is member r // Q's answer to prompt r % Q."""

    texts: list[str]
    mean_logprobs: np.ndarray  # [M, Q] float32 nats, mean over an answer's tokens
    lengths: np.ndarray  # [M * Q] int32
    overlong: int
    empty: int


def answer(
    lm: LM,
    spectra: Mapping[str, Any],
    z: Mapping[str, jax.Array],
    task: Task,
    examples: Sequence[Example],
    shape: PaddedShape | None,
    max_new_tokens: int,
) -> Answers:
    """Every member's greedy answers to the same prompts.

    Args:
      spectra: the model's nested tree.
      z: {name: [M, R]}, one z a member.
      shape: of the prompts, from `shape_of`; exactly theirs by default.
    """
    members = population_batch.own_z(spectra, z)
    keys = jnp.broadcast_to(jax.random.key(0), (len(examples),))
    prompts = population_batch.prompt_batch(lm, _tokens(lm, task, examples), keys, max_new_tokens, shape)
    rows, stops = len(members) * len(examples), chat.stops(lm, task)
    out = population_batch.answers(lm, members, prompts, sampling=Greedy(), rows=rows, stops=stops)
    found = chat.decode_until(lm, out.tokens, out.lengths, [stops] * len(out.tokens))
    means = found.means(out.logprobs).reshape(len(members), -1)
    counts = _faults(out.tokens, found.lengths, found.texts, chat.end_tokens(lm), found.stopped)
    return Answers(found.texts, means, found.lengths, *counts)


def _faults(
    tokens: np.ndarray, lengths: np.ndarray, texts: Sequence[str], eos: Sequence[int], stopped: Any
) -> tuple[int, int]:
    """(overlong, empty): rows that end without an end token or a stop text, and rows whose text is nothing."""
    last = tokens[np.arange(len(tokens)), lengths - 1]
    return int((~np.isin(last, eos) & ~np.asarray(stopped)).sum()), sum(not text.strip() for text in texts)


def shape_of(lm: LM, task: Task, source: Sequence[Example]) -> PaddedShape:
    """The shape that holds every prompt of a split."""
    return population_batch.padded_shape(_tokens(lm, task, [source[i] for i in range(len(source))]))


def _tokens(lm: LM, task: Task, examples: Sequence[Example]) -> list[list[int]]:
    return chat.tokenize(lm, [chat.render_example(lm, task, example) for example in examples])


def likelihood_of_right(rewards: np.ndarray, mean_logprobs: np.ndarray) -> np.ndarray:
    """[M] mean log-likelihood of each member's right answers, which decides between members of equal fitness.

    As in Transformer-Squared's public code; there a member with nothing right has 0, the best there is, here the least.
    """
    right = rewards > 0
    total = np.where(right, mean_logprobs, 0).sum(axis=1)
    return np.where(right.any(axis=1), total / np.maximum(right.sum(axis=1), 1), -np.inf).astype(np.float32)
