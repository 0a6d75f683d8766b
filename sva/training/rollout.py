"""Prompts to completions to rewards to a training batch."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.evaluation.grading import grade_many
from sva.generation import chat
from sva.generation.complete import CompleteOptions, complete
from sva.generation.engine import EngineConfig, prompts_at_once
from sva.generation.lm import LM
from sva.generation.merge import merge_params, with_z
from sva.generation.prompts import check_prompts
from sva.generation.sampling import Greedy, OnPolicy, Sampling
from sva.generation.stop_strings import cut
from sva.models.cache import BLOCK
from sva.parallel import exchange
from sva.parallel.processes import is_writer
from sva.parallel.sharding import row_shards
from sva.spectral.parametrisations import Frozen
from sva.tasks.base import Example, Task
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.reinforce import Batch, advantages
from sva.utils import seeds
from sva.utils.errors import UserError
from sva.utils.files import read_json, write_json
from sva.utils.padding import budget_bucket, common_prefix, left_pad, length_bucket, prompt_bucket, round_up


class PromptShape(NamedTuple):
    """Sizes that fit every prompt of a split, so that every step has the same shapes; see `prompt_shape`."""

    width: int  # tokens of a padded prompt
    longest: int  # tokens of the longest one
    shared: int  # tokens that all begin with, see `sva.utils.padding.common_prefix`


class TaskBatch(NamedTuple):
    """P examples of a task."""

    task: Task
    examples: Sequence[Example]
    shape: PromptShape


class Completions(NamedTuple):
    """A policy's completions, B = P * G rows; row r is sample r % G of prompt r // G."""

    prompt_ids: np.ndarray  # [P, T] int32, padded on the left
    prompt_mask: np.ndarray  # [P, T] int32
    tokens: np.ndarray  # [B, N] int32
    logprobs: np.ndarray  # [B, N] float32 nats, under the policy that drew: at its temperature, at 1 where it is greedy
    lengths: np.ndarray  # [B] int32, the end token among them
    texts: list[str]
    overlong: int  # rows that the budget cut off
    empty: int  # rows without any text


class RewardError(UserError):
    """A grader raised; `texts` are the completions that it was given."""

    def __init__(self, message: str, texts: Sequence[str]) -> None:
        super().__init__(message)
        self.texts = list(texts)


class Rollout(NamedTuple):
    """One step's completions with their rewards."""

    batch: Batch  # of prompts * samples rows
    rewards: np.ndarray  # [P, G] float32, +1 right, -1 wrong
    texts: list[str]
    tokens: int  # generated
    overlong: int
    empty: int


def sample(
    lm: LM,
    spectra: Mapping[str, Frozen],
    z: Mapping[str, Any],
    batch: TaskBatch,
    key: jax.Array,
    cfg: RolloutConfig,
) -> Completions:
    """Completions drawn from the adapted model, G = cfg.samples of each prompt; a pure function of its arguments.

    Row r is sample r % G of prompt r // G, drawn with fold_in(key, r).
    """
    task, ids, mask = batch.task, *prompts(lm, batch)
    total = len(ids) * cfg.samples
    budget = cfg.max_new_tokens or task.max_new_tokens
    if cfg.form == "factored" or lm.z is not None:
        adapted = with_z(lm, spectra, z)
    else:
        adapted = dataclasses.replace(lm, params=merge_params(lm.model, lm.params, spectra, z))
    keys = seeds.of_rows(key, jnp.arange(total)).reshape(len(ids), cfg.samples)
    stops = chat.stops(lm, task)
    done = complete(
        adapted,
        [row[keep] for row, keep in zip(ids, mask.astype(bool), strict=True)],
        budget,
        sampling=sampling_of(cfg),
        key=keys,
        samples=cfg.samples,
        stops=stops,
        options=CompleteOptions(
            eos_ids=chat.end_tokens(lm, stops),
            engine=engine_config(cfg, batch.shape, budget),
            shared=batch.shape.shared,
            is_checked=False,
        ),
    )
    size = budget_bucket(budget)
    tokens, logprobs = np.zeros((total, size), np.int32), np.zeros((total, size), np.float32)
    lengths, texts, overlong = np.zeros(total, np.int32), [""] * total, 0
    for one in done:
        row = one.prompt * cfg.samples + one.sample
        lengths[row], texts[row] = len(one.tokens), one.text
        tokens[row, : lengths[row]], logprobs[row, : lengths[row]] = one.tokens, one.logprobs
        overlong += one.reason == "length"
    empty = sum(not text.strip() for text in texts)
    return Completions(ids, mask, tokens, logprobs, lengths, texts, overlong, empty)


def engine_config(cfg: RolloutConfig, shape: PromptShape, budget: int, backend: str | None = None) -> EngineConfig:
    """The shapes of the engine's programs, the same in every step, for the devices of `backend` (JAX's own by default).

    On an accelerator there is one program of each kind: a row has all the slots that it may ever need. A CPU, on which
    attention costs more than compiling, takes them tier by tier.
    """
    rows = cfg.rows_at_work(row_shards())
    width = shape.longest - shape.shared
    settings = EngineConfig(rows, prompts=prompts_at_once(rows), width=width)
    if (backend or jax.default_backend()) == "cpu":
        return settings
    most = prompt_bucket(width) + round_up(budget, settings.steps)
    return dataclasses.replace(settings, one_bucket=True, tier=round_up(most, BLOCK))


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """The strategy that draws, and reports the log-probs that the update compares with its own."""
    return OnPolicy(cfg.temperature) if cfg.temperature else Greedy()


def grade(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """[P, G] float32 rewards of P * G texts, +1 right, -1 wrong.

    Raises:
      RewardError: the grader raised.
    """
    samples = len(texts) // len(examples)
    repeated = [example for example in examples for _ in range(samples)]
    try:
        grades = grade_many(task, [cut(text, task.stop) for text in texts], repeated)
    except UserError:  # such as a sandbox that cannot be had here
        raise
    except Exception as error:
        said = str(error).split("\n")[0]
        raise RewardError(
            f"the reward of task {task.name} raised {type(error).__name__} ({said}); it must judge any text",
            texts,
        ) from error
    return np.where([grade.correct for grade in grades], 1.0, -1.0).astype(np.float32).reshape(-1, samples)


def with_rewards(lm: LM, drawn: Completions, rewards: np.ndarray, cfg: RolloutConfig, loss: ReinforceConfig) -> Rollout:
    """The training batch of completions whose rewards [P, G] are known.

    Columns that no row reaches are cut off, in halves of the budget, so that short completions make a small update
    and there are few shapes to compile.
    """
    tokens, lengths = drawn.tokens, drawn.lengths
    scored = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    if not cfg.score_eos:
        scored &= ~np.isin(tokens, chat.end_tokens(lm))
    width = _half_bucket(int(lengths.max()), tokens.shape[1])
    batch = Batch(
        prompt_ids=jnp.asarray(drawn.prompt_ids),
        prompt_mask=jnp.asarray(drawn.prompt_mask),
        completion_ids=jnp.asarray(tokens[:, :width]),
        completion_mask=jnp.asarray(scored[:, :width], jnp.int32),
        advantages=advantages(jnp.asarray(rewards), loss).reshape(-1),
        sampled=jnp.asarray(drawn.logprobs[:, :width]),
        temperature=jnp.full(len(tokens), cfg.temperature, jnp.float32) if cfg.is_tempered else None,
    )
    return Rollout(batch, rewards, drawn.texts, int(lengths.sum()), drawn.overlong, drawn.empty)


def _half_bucket(longest: int, budget: int) -> int:
    """The budget, halved while it stays whole, a multiple of 8 and no less than `longest`; three times at most."""
    for _ in range(3):
        if budget % 16 or budget // 2 < longest:
            break
        budget //= 2
    return budget


class Verdicts:
    """The rewards of a run's last graded steps, on disk before they are used.

    A step that is done again after a kill gets the rewards that it got, even from a grader whose verdict depends on
    the clock or on a program's luck.
    """

    def __init__(self, directory: Path, steps: int = 1) -> None:
        """Keeps those of the last `steps` steps: as many as lie between two saved states."""
        self._path, self._steps = directory / "verdicts.json", steps

    def rewards(self, step: int, texts: Sequence[str], grade: Callable[[], np.ndarray]) -> np.ndarray:
        """[P, G] float32: those on disk if they are of this step and these texts, else what `grade` gives, kept.

        Raises:
          UserError: what `grade` raises; the disk is full.
        """
        known = exchange.from_process_0(lambda: read_json(self._path).get("steps", {}) if self._path.exists() else {})
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
        if known.get(str(step), {}).get("texts") == digest:
            return np.asarray(known[str(step)]["rewards"], np.float32)
        rewards = grade()
        if is_writer():
            kept = {number: one for number, one in known.items() if step - self._steps < int(number) < step}
            write_json(self._path, {"steps": {**kept, str(step): {"texts": digest, "rewards": rewards.tolist()}}})
        return rewards


def prompt_shape(lm: LM, task: Task, source: Sequence[Example]) -> PromptShape:
    """The shape that holds every prompt of a split, padded to a length bucket.

    Raises:
      UserError: a prompt is empty, or leaves too little of the model's context.
    """
    ids, mask = _encode(lm, task, [source[i] for i in range(len(source))])
    rows = [row[keep] for row, keep in zip(ids, mask.astype(bool), strict=True)]
    longest = int(mask.sum(axis=1).max())
    return PromptShape(length_bucket(longest), longest, common_prefix(rows))


def prompts(lm: LM, batch: TaskBatch) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [P, width] int32 of the examples' prompts, padded on the left."""
    return left_pad(*_encode(lm, batch.task, batch.examples), batch.shape.width)


def _encode(lm: LM, task: Task, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = chat.encode(lm, [chat.render_example(lm, task, example) for example in examples])
    check_prompts(mask.sum(axis=1), task.max_new_tokens, lm.model.cfg)
    return ids, mask
