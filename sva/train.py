"""Training one expert: the state, one update, and the loop that can be killed at any moment."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sva.checkpoint import Checkpoints
from sva.errors import UserError, above, at_least
from sva.lm import LM
from sva.metrics import MetricsLog
from sva.models.transformer import Transformer
from sva.reinforce import Batch, ReinforceConfig, reinforce_loss
from sva.rollout import RolloutConfig, prompt_width, rollout
from sva.spectral.family import Family
from sva.spectral.forms import Spectrum
from sva.tasks.base import Task
from sva.tasks.batches import batch_indices


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop and the optimiser."""

    steps: int = 12
    lr: float = 1e-2
    clip_norm: float = 1e-3  # of the joint gradient, before Adam; the paper's (table 6)
    micro_batch: int = 2  # prompts whose completions' activations are held at once
    remat: bool = True  # recompute each layer in the backward pass: a third more work, a fraction of the memory

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 0)
        above("train.lr", self.lr, 0)
        above("train.clip_norm", self.clip_norm, 0)
        at_least("train.micro_batch", self.micro_batch, 1)

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped Adam, as the public code."""
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adam(self.lr))


def check_micro_batch(rollouts: RolloutConfig, cfg: TrainConfig) -> None:
    """Raises UserError unless a step's prompts fall into whole micro-batches."""
    if rollouts.prompts % cfg.micro_batch:
        raise UserError(
            f"rollout.prompts={rollouts.prompts} is no multiple of train.micro_batch={cfg.micro_batch}; change one"
        )


@struct.dataclass
class ExpertState:
    """All that training changes: under a megabyte for a 135M model, under 10 for an 8B one."""

    raw: Any  # {weight name: [R]}
    opt_state: Any
    step: jax.Array  # [] int32, updates done


def init_state(spectra: Mapping[str, Spectrum], family: Family, cfg: TrainConfig) -> ExpertState:
    """The state before the first update: z is 1."""
    raw = {name: family.init(spectrum.s) for name, spectrum in spectra.items()}
    return ExpertState(raw, cfg.optimizer().init(raw), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("model", "family", "loss", "cfg"))
def train_step(
    state: ExpertState,
    spectra: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    sampled: jax.Array,
    *,
    model: Transformer,
    family: Family,
    loss: ReinforceConfig,
    cfg: TrainConfig,
) -> tuple[ExpertState, dict[str, jax.Array]]:
    """One update from one batch, in micro-batches.

    Args:
      state: what is trained.
      spectra: the model's nested tree of spectra.
      params: base weights.
      batch: of P prompts, a multiple of cfg.micro_batch.
      sampled: [B, N] log-probs as the sampler saw them.
    Returns:
      (new state, metrics): loss, policy_loss, kl, entropy (nats a token), grad_norm, logprob_gap (largest difference
      between the sampler's and the trainer's log-probs, nats), z_spread (standard deviation of z).
    """
    model = model.clone(remat=cfg.remat)
    prompts = batch.prompt_ids.shape[0]
    count = prompts // cfg.micro_batch
    pieces = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), (batch, sampled))

    def loss_of(raw: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reinforce_loss(model.nest(raw), spectra, params, batch, model=model, family=family, cfg=loss)

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        batch, sampled = piece
        (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.raw, batch)
        gap = jnp.max(jnp.abs(aux.pop("logprobs") - sampled * batch.completion_mask))
        sums, largest = total
        return (jax.tree.map(jnp.add, sums, (grads, {"loss": value, **aux})), jnp.maximum(largest, gap)), None

    zeros = {name: jnp.zeros(()) for name in ("loss", "policy_loss", "kl", "entropy")}
    start = ((jax.tree.map(jnp.zeros_like, state.raw), zeros), jnp.zeros(()))
    (sums, gap), _ = jax.lax.scan(add, start, pieces)
    grads, metrics = jax.tree.map(lambda x: x / count, sums)
    metrics["entropy"] *= batch.completion_mask.shape[0] / jnp.maximum(batch.completion_mask.sum(), 1)
    updates, opt_state = cfg.optimizer().update(grads, state.opt_state, state.raw)
    raw: Any = optax.apply_updates(state.raw, updates)
    z = jax.tree.map(lambda raw, spectrum: family.z(raw, spectrum.s), model.nest(raw), spectra)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "logprob_gap": gap,
        "z_spread": jnp.std(jnp.concatenate([x.ravel() for x in jax.tree.leaves(z)])),
    }
    return ExpertState(raw, opt_state, state.step + 1), metrics


def fit(
    lm: LM,
    spectra: Mapping[str, Spectrum],
    family: Family,
    task: Task,
    run_dir: Path,
    *,
    rollouts: RolloutConfig,
    loss: ReinforceConfig,
    cfg: TrainConfig,
    seed: int,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> ExpertState:
    """Trains until cfg.steps updates are done, going on from whatever `run_dir` holds.

    The state is saved after every step, and a step is a pure function of (seed, step, state): killed and started
    again, a run ends in the same state bit for bit.

    Args:
      on_step: called with each step's row of metrics.
    Raises:
      UserError: the prompts are no multiple of the micro-batch, or the disk is full.
      FloatingPointError: the loss or the gradient is not finite; the last sound state is kept.
    """
    check_micro_batch(rollouts, cfg)
    source = task.source("train")
    width = prompt_width(lm, task, source)
    nested = lm.model.nest(spectra)
    scales = {name: spectrum.s for name, spectrum in spectra.items()}
    checkpoints = Checkpoints(run_dir / "state")
    state = init_state(spectra, family, cfg)
    restored = checkpoints.restore(state)
    start, state = restored if restored else (0, state)
    log = MetricsLog(run_dir, start)
    try:
        for step in range(start, cfg.steps):
            started = time.perf_counter()
            examples = [source[i] for i in batch_indices(len(source), rollouts.prompts, step, seed)]
            z = _effective(state.raw, scales, family)
            key = jax.random.fold_in(jax.random.key(seed), step)
            result = rollout(lm, spectra, z, task, examples, key, rollouts, loss, width)
            sampled_at = time.perf_counter()
            state, metrics = train_step(
                state,
                nested,
                lm.params,
                result.batch,
                result.logprobs,
                model=lm.model,
                family=family,
                loss=loss,
                cfg=cfg,
            )
            metrics = {name: float(value) for name, value in metrics.items()}
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
                raise FloatingPointError(f"step {step}: loss {metrics['loss']}, gradient {metrics['grad_norm']}")
            ended = time.perf_counter()
            row = {
                "step": step,
                "reward": float(result.rewards.mean()),
                "accuracy": float((result.rewards > 0).mean()),
                **metrics,
                "tokens": result.tokens,
                "mean_length": result.tokens / result.rewards.size,
                "tokens_per_second": result.tokens / (sampled_at - started),
                "rollout_seconds": sampled_at - started,
                "update_seconds": ended - sampled_at,
            }
            log.write(row)
            checkpoints.save(step + 1, state)
            on_step(row)
    finally:
        log.close()
        checkpoints.close()
    return state


@partial(jax.jit, static_argnames=("family",))
def _effective(raw: Mapping[str, Any], scales: Mapping[str, Any], family: Family) -> dict[str, jax.Array]:
    return {name: family.z(raw[name], scales[name]) for name in raw}
