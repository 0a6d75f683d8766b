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

from sva.adam import bfloat16_adam
from sva.checkpoint import Checkpoints
from sva.distributed import is_writer, to_host
from sva.errors import UserError, above, at_least
from sva.lm import LM
from sva.metrics import MetricsLog
from sva.models.layout import place_rows
from sva.models.transformer import Transformer
from sva.reinforce import Batch, ReinforceConfig, reinforce_loss, sites_of
from sva.rollout import RolloutConfig, prompt_width, rollout
from sva.sharding import constrain, place, repeat_all, replicated
from sva.spectral.family import Family
from sva.spectral.forms import Spectrum
from sva.spectral.members import Site, sites
from sva.tasks.base import Task
from sva.tasks.batches import batch_indices

PARAM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop and the optimiser."""

    steps: int = 12
    lr: float = 1e-2
    clip_norm: float = 1e-3  # of the joint gradient, before Adam; the paper's (table 6)
    micro_batch: int = 2  # prompts whose completions' activations are held at once
    remat: bool = True  # recompute each layer in the backward pass: a third more work, a fraction of the memory
    param_dtype: str = "float32"  # of raw values and Adam's state; "bfloat16" as the public code, see `sva.adam`
    bound: float | None = None  # raw values are held this near to their family's centre, see `apply_gradient`

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 0)
        above("train.lr", self.lr, 0)
        above("train.clip_norm", self.clip_norm, 0)
        at_least("train.micro_batch", self.micro_batch, 1)
        if self.param_dtype not in PARAM_DTYPES:
            raise UserError(f"train.param_dtype={self.param_dtype!r} is not known; use {' or '.join(PARAM_DTYPES)}")
        if self.bound is not None:
            above("train.bound", self.bound, 0)

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped Adam, as the public code."""
        adam = bfloat16_adam(self.lr) if self.param_dtype == "bfloat16" else optax.adam(self.lr)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)


def check_micro_batch(rollouts: RolloutConfig, cfg: TrainConfig) -> None:
    """Raises UserError unless a step's prompts fall into whole micro-batches."""
    if rollouts.prompts % cfg.micro_batch:
        raise UserError(
            f"rollout.prompts={rollouts.prompts} is no multiple of train.micro_batch={cfg.micro_batch}; change one"
        )


@struct.dataclass
class ExpertState:
    """All that training changes: under a megabyte for a 135M model, under 10 for an 8B one."""

    raw: Any  # {weight name: [R]} for most families; in cfg.param_dtype
    opt_state: Any
    step: jax.Array  # [] int32, updates done


def init_state(spectra: Mapping[str, Spectrum], family: Family, cfg: TrainConfig) -> ExpertState:
    """The state before the first update: the base model."""
    raw = jax.tree.map(lambda x: x.astype(cfg.param_dtype), family.start(sites(spectra)))
    return ExpertState(raw, cfg.optimizer().init(raw), jnp.zeros((), jnp.int32))


def apply_gradient(raw: Any, opt_state: Any, grads: Any, *, family: Family, cfg: TrainConfig) -> tuple[Any, Any]:
    """(raw, opt_state) after one update by float32 gradients.

    With cfg.bound, every raw value is then put back to within that distance of the family's centre: of 0 for
    `sigmoid_nuclear`, where a bound of 1.0 is what bfloat16 imposes at lr 2e-3 (z between 0.27 and 0.73 before its
    rescaling); of 1, the base, for the families that train z itself; of 0, the base, for `banded`, `core` and
    `projected`. In bfloat16 the bound itself is rounded, by up to 0.4 %.
    """
    updates, opt_state = cfg.optimizer().update(grads, opt_state, raw)
    raw = optax.apply_updates(raw, updates)
    if cfg.bound is not None:
        low, high = family.centre - cfg.bound, family.centre + cfg.bound
        raw = jax.tree.map(lambda x: jnp.clip(x, low, high), raw)
    return raw, opt_state


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
      between the sampler's and the trainer's log-probs, nats), z_spread (standard deviation of z, or of the entries
      of cores and bands).
    """
    model = model.clone(remat=cfg.remat)
    prompts = batch.prompt_ids.shape[0]
    count = prompts // cfg.micro_batch

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    pieces = jax.tree.map(split, (batch, sampled))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), state.raw)  # so that gradients and their sums are float32

    def loss_of(raw: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reinforce_loss(model.nest(raw), spectra, params, batch, model=model, family=family, cfg=loss)

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        batch, sampled = piece
        (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(exact, batch)
        gap = jnp.max(jnp.abs(aux.pop("logprobs") - sampled * batch.completion_mask))
        sums, largest = total
        return (jax.tree.map(jnp.add, sums, (grads, {"loss": value, **aux})), jnp.maximum(largest, gap)), None

    zeros = {name: jnp.zeros(()) for name in ("loss", "policy_loss", "kl", "entropy")}
    start = ((jax.tree.map(jnp.zeros_like, exact), zeros), jnp.zeros(()))
    (sums, gap), _ = jax.lax.scan(add, start, pieces)
    grads, metrics = jax.tree.map(lambda x: x / count, sums)
    metrics["entropy"] *= batch.completion_mask.shape[0] / jnp.maximum(batch.completion_mask.sum(), 1)
    raw, opt_state = apply_gradient(state.raw, state.opt_state, grads, family=family, cfg=cfg)
    middles = family.middles(model.nest(raw), sites_of(model, spectra))
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "logprob_gap": gap,
        "z_spread": jnp.std(jnp.concatenate([x.ravel() for x in jax.tree.leaves(middles)])),
    }
    return repeat_all((ExpertState(raw, opt_state, state.step + 1), metrics))


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
    run_on = nested if rollouts.form == "factored" else spectra
    places = sites(spectra)
    checkpoints = Checkpoints(run_dir / "state")
    state = init_state(spectra, family, cfg)
    restored = checkpoints.restore(state)
    start, state = restored if restored else (0, state)
    if lm.mesh is not None:
        everywhere = replicated(lm.mesh)
        state = place(to_host(state), jax.tree.map(lambda _: everywhere, state))
    log = MetricsLog(run_dir, start) if is_writer() else None
    try:
        for step in range(start, cfg.steps):
            started = time.perf_counter()
            examples = [source[i] for i in batch_indices(len(source), rollouts.prompts, step, seed)]
            middles = _middles(state.raw, places, family)
            key = jax.random.fold_in(jax.random.key(seed), step)
            result = rollout(lm, run_on, middles, task, examples, key, rollouts, loss, width)
            sampled_at = time.perf_counter()
            state, metrics = train_step(
                state,
                nested,
                lm.params,
                *place_rows((result.batch, result.logprobs), lm.mesh),
                model=lm.model,
                family=family,
                loss=loss,
                cfg=cfg,
            )
            metrics = {name: float(value) for name, value in to_host(metrics).items()}
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
            if log is not None:
                log.write(row)
            checkpoints.save(step + 1, state)
            on_step(row)
    finally:
        if log is not None:
            log.close()
        checkpoints.close()
    return state


@partial(jax.jit, static_argnames=("family",))
def _middles(raw: Any, places: Mapping[str, Site], family: Family) -> dict[str, Any]:
    return family.middles(raw, places)
