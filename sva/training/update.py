"""One update of an expert: its training state, the gradient in micro-batches, the optimiser's step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sva.adapters.family import Family
from sva.models import layout
from sva.models.transformer import Transformer, check_gradients
from sva.parallel.sharding import constrain, repeat_all
from sva.spectral.parametrisations import Frozen, matrix_infos
from sva.training.config.reinforce import ReinforceConfig
from sva.training.optimizers import UpdateConfig, optimizer
from sva.training.reinforce import LOAD, Batch, matrix_infos_of, reinforce_loss
from sva.training.validation import Best


@struct.dataclass
class ExpertState:
    """All that training changes: under a megabyte for a 135M model, under 10 for an 8B one."""

    raw: Any  # {weight name: [R]} for most families, [X, R] for all modules of a layer; in train.param_dtype
    opt_state: Any  # of the optimiser, or of the search
    step: jax.Array  # [] int32, updates done
    best: Best | None = None  # where the run validates

    @property
    def chosen(self) -> Any:
        """The raw values that the run is for: the best ones where it validates, else the last."""
        return self.raw if self.best is None else self.best.raw


def init_state(spectra: Mapping[str, Frozen], family: Family, cfg: UpdateConfig) -> ExpertState:
    """The state before the first update: the base model."""
    raw = jax.tree.map(lambda x: x.astype(cfg.param_dtype), family.start(matrix_infos(spectra)))
    return ExpertState(raw, optimizer(cfg).init(raw), jnp.zeros((), jnp.int32))


def apply_gradient(raw: Any, opt_state: Any, grads: Any, *, family: Family, cfg: UpdateConfig) -> tuple[Any, Any]:
    """(raw, opt_state) after one update by float32 gradients.

    With cfg.bound, every raw value is then put back to within that distance of the family's centre: of 0 for
    `sigmoid_nuclear`, where a bound of 1.0 is what bfloat16 imposes at lr 2e-3 (z between 0.27 and 0.73 before its
    rescaling); of 1, the base, for the families that train z itself; of 0, the base, for `banded`, `core` and
    `projected`. In bfloat16 the bound itself is rounded, by up to 0.4 %.
    """
    updates, opt_state = optimizer(cfg).update(grads, opt_state, raw)
    raw = optax.apply_updates(raw, updates)
    if cfg.bound is not None:
        low, high = family.centre - cfg.bound, family.centre + cfg.bound
        raw = jax.tree.map(lambda x: jnp.clip(x, low, high), raw)
    return raw, opt_state


def micro_batches(batch: Batch, prompts: int) -> tuple[Batch, int]:
    """(the batch with a leading axis of micro-batches of `prompts` prompts each, how many there are)."""
    count = batch.prompt_ids.shape[0] // prompts
    if batch.temperature is not None:  # one for all rows is split as if each had its own
        rows = batch.completion_ids.shape[:1]
        batch = dataclasses.replace(batch, temperature=jnp.broadcast_to(jnp.asarray(batch.temperature), rows))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch), count


def mean_gradient(
    loss_of: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]],
    raw: Any,
    batch: Batch,
    prompts: int,
    more: Sequence[str] = (),
) -> tuple[Any, dict[str, jax.Array]]:
    """(gradient, metrics) of a whole batch: the means over its micro-batches of `prompts` prompts.

    Args:
      loss_of: (loss, aux) of raw values and one micro-batch, as `reinforce_loss`.
      raw: float32, so that gradients and their sums are as well.
      more: names of further numbers that aux has.
    """

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(raw, piece)
        logprobs = aux.pop("logprobs")
        sampled = logprobs if piece.sampled is None else piece.sampled * piece.completion_mask
        gap = jnp.abs(logprobs - sampled)
        sums, largest = total
        new = (grads, {"loss": value, "logprob_gap_mean": gap.sum() / gap.shape[0], **aux})
        return (jax.tree.map(jnp.add, sums, new), jnp.maximum(largest, gap.max())), None

    names = ("loss", "policy_loss", "kl", "entropy", "clipped", "logprob_gap_mean", *more)
    start = ((jax.tree.map(jnp.zeros_like, raw), {name: jnp.zeros(()) for name in names}), jnp.zeros(()))
    pieces, count = micro_batches(batch, prompts)
    (sums, gap), _ = jax.lax.scan(add, start, pieces)
    grads, metrics = jax.tree.map(lambda x: x / count, sums)
    rows_a_token = batch.completion_mask.shape[0] / jnp.maximum(batch.completion_mask.sum(), 1)
    metrics |= {name: metrics[name] * rows_a_token for name in ("entropy", "clipped", "logprob_gap_mean")}
    return grads, {**metrics, "grad_norm": optax.tree.norm(grads), "logprob_gap": gap}


@partial(jax.jit, static_argnames=("model", "family", "loss"))
def train_step(
    state: ExpertState,
    spectra: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    *,
    model: Transformer,
    family: Family,
    loss: ReinforceConfig,
    cfg: UpdateConfig,
) -> tuple[ExpertState, dict[str, jax.Array]]:
    """One update from one batch, in micro-batches.

    Args:
      state: what is trained.
      spectra: the model's nested tree of spectra, or of `Matrix` for a family without them.
      params: base weights.
      batch: of P prompts, a multiple of cfg.micro_batch.
    Returns:
      (new state, metrics): loss, policy_loss, kl (nats a completion), entropy (nats a token), clipped (share of the
      tokens whose gradient a clipped ratio stopped), grad_norm, logprob_gap and logprob_gap_mean (largest and mean
      difference between the sampler's and the trainer's log-probs of a token, nats, both at the batch's temperature;
      0 where nothing was sampled),
      z_spread (standard deviation of z, or of the entries of cores and bands; not of a family without spectra),
      moe_load (see `reinforce_loss`; of a mixture of experts).
    """
    check_gradients(model)
    model = model.clone(remat=cfg.remat)

    def loss_of(raw: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reinforce_loss(model.nest(raw), spectra, params, batch, model=model, family=family, cfg=loss)

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), state.raw)
    more = () if model.cfg.moe is None else (LOAD,)
    grads, metrics = mean_gradient(loss_of, exact, batch, cfg.micro_batch, more)
    raw, opt_state = apply_gradient(state.raw, state.opt_state, grads, family=family, cfg=cfg)
    if family.has_spectra:
        z = family.z(model.nest(raw), matrix_infos_of(model, spectra))
        metrics["z_spread"] = jnp.std(jnp.concatenate([x.ravel() for x in jax.tree.leaves(z)]))
    new = dataclasses.replace(state, raw=raw, opt_state=opt_state, step=state.step + 1)
    return place_trained(new, model, family), repeat_all(metrics)


def place_trained(state: ExpertState, model: Transformer, family: Family) -> ExpertState:
    """The state, constrained to lie on a mesh as `layout.trained` says, where one is set."""
    leaves = layout.trained(model.cfg, family, state)
    return jax.tree.map(lambda x, leaf: constrain(x, *leaf.axes, units=leaf.units), state, leaves)
