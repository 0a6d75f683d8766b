"""Prompts to graded completions to a training batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva import chat
from sva.buckets import budget_bucket, left_pad, length_bucket
from sva.distributed import to_host
from sva.errors import UserError, above, at_least
from sva.generate import generate
from sva.lm import LM, check_prompts, merge_params, pad_eos
from sva.reinforce import Batch, ReinforceConfig, advantages
from sva.sampling import Temperature
from sva.spectral.cores import adapters
from sva.spectral.forms import Spectrum
from sva.tasks.base import Example, Task


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of one step's rollout."""

    prompts: int = 8  # different prompts a step
    samples: int = 8  # completions of each
    max_new_tokens: int | None = None  # the task's own budget by default
    temperature: float = 1.0
    score_eos: bool = True  # train the end token too; the public code never does
    form: str = (
        "dense"  # merged once a step, beside the base; "factored": on the spectra alone, which spares the weights
    )

    def __post_init__(self) -> None:
        at_least("rollout.prompts", self.prompts, 1)
        at_least("rollout.samples", self.samples, 1)
        if self.max_new_tokens is not None:
            at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        above("rollout.temperature", self.temperature, 0)
        if self.form not in ("dense", "factored"):
            raise UserError(f"rollout.form={self.form!r} is not known; use dense or factored")


class Rollout(NamedTuple):
    """One step's completions."""

    batch: Batch  # of prompts * samples rows
    logprobs: np.ndarray  # [B, N] float32 nats, as the sampler saw them
    rewards: np.ndarray  # [P, G] float32, +1 right, -1 wrong
    texts: list[str]
    tokens: int  # generated


def rollout(
    lm: LM,
    spectra: Mapping[str, Spectrum],
    z: Mapping[str, jax.Array],
    task: Task,
    examples: Sequence[Example],
    key: jax.Array,
    cfg: RolloutConfig,
    loss: ReinforceConfig,
    width: int,
) -> Rollout:
    """Samples from the adapted model (merged once), grades, and forms the batch.

    Prompts are padded to `width` tokens (`prompt_width`), so that every step has the same shapes. Row r of
    the batch is sample r % G of prompt r // G, drawn with fold_in(key, r): a pure function of its arguments.
    """
    ids, mask = left_pad(*_encode(lm, task, examples), width)
    rows = len(examples) * cfg.samples
    budget = cfg.max_new_tokens or task.max_new_tokens
    eos = chat.end_tokens(lm)
    params, adapter = lm.params, None
    if cfg.form == "factored":
        adapter = adapters(lm.model.nest(spectra), lm.model.nest(z))
    else:
        params = merge_params(lm.model, lm.params, spectra, z)
    out = generate(
        lm.model,
        params,
        ids,
        mask,
        jnp.asarray(budget, jnp.int32),
        pad_eos(eos),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)),
        adapter,
        max_new_tokens=budget_bucket(budget),
        sampling=Temperature(cfg.temperature),
        samples=cfg.samples,
    )
    tokens, logprobs, lengths = to_host(out)
    completions = chat.decode(lm, tokens, lengths)
    right = [task.grade(text, examples[row // cfg.samples]).correct for row, text in enumerate(completions)]
    rewards = np.where(right, 1.0, -1.0).astype(np.float32).reshape(-1, cfg.samples)
    scored = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    if not cfg.score_eos:
        scored &= ~np.isin(tokens, eos)
    batch = Batch(
        prompt_ids=jnp.asarray(ids),
        prompt_mask=jnp.asarray(mask),
        completion_ids=jnp.asarray(tokens),
        completion_mask=jnp.asarray(scored, jnp.int32),
        advantages=advantages(jnp.asarray(rewards), loss).reshape(-1),
    )
    return Rollout(batch, logprobs, rewards, completions, int(lengths.sum()))


def prompt_width(lm: LM, task: Task, source: Sequence[Example]) -> int:
    """The length bucket that holds every prompt of a split.

    Raises:
      UserError: a prompt is empty, or leaves too little of the model's context.
    """
    _, mask = _encode(lm, task, [source[i] for i in range(len(source))])
    return length_bucket(mask.shape[1])


def _encode(lm: LM, task: Task, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = chat.encode(lm, [chat.render(lm, task.question(example)) for example in examples])
    check_prompts(mask.sum(axis=1), task.max_new_tokens, lm.model.cfg.max_position_embeddings)
    return ids, mask
