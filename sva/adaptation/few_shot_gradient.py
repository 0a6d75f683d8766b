"""Few-shot adaptation by gradient: alphas are the only parameters, and every product around them is differentiated.

| objective    | what is climbed                                              |
|--------------|--------------------------------------------------------------|
| `likelihood` | mean log-likelihood (nats a token) of the shots' own answers |
| `accuracy`   | expected accuracy, by policy gradient on sampled answers     |

Not in Transformer-Squared, which searches.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sva.adaptation.few_shot import FewShotConfig, Pool, Progress, Shots, draws, shot_tokens
from sva.evaluation.likelihood import continuation_logprobs
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.prompts import check_prompts
from sva.models.transformer import Transformer, check_gradients
from sva.parallel.sharding import repeat_all
from sva.spectral.mixing import mixture
from sva.training.advantages import group
from sva.training.sft import solution_tokens
from sva.utils.errors import UserError, above, at_least
from sva.utils.padding import length_bucket, pad_tokens


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """Settings of the ascent."""

    objective: str = "likelihood"
    lr: float = 0.05  # of Adam
    samples: int = 8  # answers to each shot, of `accuracy`

    def __post_init__(self) -> None:
        if self.objective not in ("likelihood", "accuracy"):
            raise UserError(f"objective={self.objective!r} is not known; use likelihood or accuracy")
        above("lr", self.lr, 0)
        at_least("samples", self.samples, 2)


@struct.dataclass
class State:
    """The alphas, and their optimiser."""

    alphas: jax.Array  # [E] or [M, E]
    opt_state: Any


class ScoredRows(NamedTuple):
    """B prompts with what follows them, padded on the right, all [B, T] int32."""

    ids: np.ndarray
    mask: np.ndarray
    scored: np.ndarray  # 1 for the tokens that follow


def init(start: jax.Array, cfg: GradientConfig) -> State:
    """The state that begins at `start`."""
    return State(start, optax.adam(cfg.lr).init(start))


def scored_rows(lm: LM, prompts: Sequence[Sequence[int]], following: Sequence[Sequence[int]]) -> ScoredRows:
    """Prompts and what follows each, in one length bucket.

    Raises:
      UserError: one is longer than the model's context.
    """
    whole = [[*prompt, *after] for prompt, after in zip(prompts, following, strict=True)]
    lengths = np.asarray([len(row) for row in whole])
    check_prompts(lengths, 1, lm.model.cfg)
    ids, mask = pad_tokens(whole, length_bucket(int(lengths.max())), side="right")
    starts = np.asarray([len(prompt) for prompt in prompts])
    scored = mask * (np.arange(mask.shape[1])[None, :] >= starts[:, None])
    return ScoredRows(ids=ids, mask=mask, scored=scored.astype(np.int32))


def objective(
    alphas: jax.Array,
    model: Transformer,
    params: Mapping[str, Any],
    bank: Mapping[str, Any],
    rows: ScoredRows,
    row_weights: jax.Array,
) -> jax.Array:
    """[] float32: sum over rows of row_weights [B] times the log-probability (nats) of the rest, under one mixture.

    Args:
      alphas: [E], or [M, E] for one a matrix; differentiate in it.
      bank: the model's nested tree of `Slots`, of E + 1 slots.
    """
    padded = jnp.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(1, 0)])
    each = jnp.broadcast_to(padded, (len(rows.ids), *padded.shape))
    return jnp.sum(row_weights * continuation_logprobs(model, params, *rows, mixture(bank, each)))


@partial(jax.jit, static_argnames=("model", "lr"))
def ascend(
    state: State,
    model: Transformer,
    params: Mapping[str, Any],
    bank: Mapping[str, Any],
    rows: ScoredRows,
    row_weights: jax.Array,
    *,
    lr: float,
) -> tuple[State, jax.Array]:
    """The state after one step of Adam up `objective`, and its value before."""
    check_gradients(model)
    value, gradient = jax.value_and_grad(objective)(state.alphas, model, params, bank, rows, row_weights)
    updates, opt_state = optax.adam(lr).update(-gradient, state.opt_state)
    return repeat_all((State(jnp.asarray(optax.apply_updates(state.alphas, updates)), opt_state), value))


def adapt(
    lm: LM,
    pool: Pool,
    shots: Shots,
    gradient: GradientConfig,
    cfg: FewShotConfig,
    key: jax.Array,
    *,
    state: State,
    generations: range,
) -> Iterator[Progress]:
    """The ascent after each of `generations`; arguments as `few_shot.adapt`, `state` from `init`.

    Raises:
      UserError: `likelihood`, and a shot has no answer that its own grader calls right.
    """
    prompts = shot_tokens(lm, shots)
    if gradient.objective == "likelihood":
        solutions = solution_tokens(lm, shots.task, shots.examples)
        rows = scored_rows(lm, prompts, solutions)
        row_weights = jnp.asarray([1 / (len(solutions) * len(tokens)) for tokens in solutions], jnp.float32)
        for number in generations:
            state, value = ascend(state, lm.model, lm.params, pool.bank, rows, row_weights, lr=gradient.lr)
            check_finite(lm, np.asarray(value)[None], "ascent")
            yield Progress(number, np.asarray(state.alphas), state, {"nats": float(value)})
        return
    size = len(prompts)
    for number in generations:
        found = draws(lm, pool, state.alphas, shots, gradient.samples, cfg, jax.random.fold_in(key, number))
        places = [row.prompt for row in found]
        right = shots.right([row.text for row in found], places).reshape(size, gradient.samples)
        rows = scored_rows(lm, [prompts[i] for i in places], [row.tokens.tolist() for row in found])
        row_weights = group(jnp.asarray(right, jnp.float32)).reshape(-1) / right.size
        state, _ = ascend(state, lm.model, lm.params, pool.bank, rows, row_weights, lr=gradient.lr)
        means = right.mean(axis=1)
        row = {"best": float(means.max()), "mean": float(right.mean()), "tokens": sum(len(row.tokens) for row in found)}
        yield Progress(number, np.asarray(state.alphas), state, row)
