"""REINFORCE on the scale of singular values: the batch, the advantages and the loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.errors import UserError
from sva.logprobs import score
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.models.weights import expected
from sva.spectral.cores import adapters
from sva.spectral.family import Family, check_raw
from sva.spectral.forms import Spectrum
from sva.spectral.members import Site, seed_of
from sva.spectral.svd import require_whole


@struct.dataclass
class Batch:
    """B completions of P prompts and what they earned; completion r answers prompt r // (B / P).

    Prompts are padded on the left, completions on the right. With several completions a prompt, the prompt is
    computed once, forwards and backwards.
    """

    prompt_ids: jax.Array  # [P, T] int32
    prompt_mask: jax.Array  # [P, T] int32
    completion_ids: jax.Array  # [B, N] int32
    completion_mask: jax.Array  # [B, N] int32, 1 for the tokens that are read and scored: the first ones of a row
    advantages: jax.Array  # [B] float32, unitless; the reward itself where there is no baseline


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    """Settings of the loss."""

    kl_coef: float = 0.0  # lambda of arXiv 2501.06252; the paper tries 0, 0.1, 0.2, 0.3
    baseline: str = "group"  # "none": the reward itself, as the paper; see `advantages` for "group" and "batch"

    def __post_init__(self) -> None:
        if self.baseline not in ("none", "group", "batch"):
            raise UserError(f"reinforce.baseline={self.baseline!r} is not known; use none, group or batch")
        if self.kl_coef < 0:
            raise UserError(f"reinforce.kl_coef={self.kl_coef} must not be negative")


def advantages(rewards: jax.Array, cfg: ReinforceConfig) -> jax.Array:
    """[P, G] advantages of rewards [P, G], G samples a prompt.

    "group" takes the group's mean away and divides by its standard deviation (GRPO, arXiv 2402.03300, section 4.1); a
    group whose rewards are all equal teaches nothing and gets 0. "batch" takes mean and deviation over all samples of
    all prompts (REINFORCE++, arXiv 2501.03262): a policy that always gives the same answer still learns where it is
    wrong, which a classifier that collapsed onto one label would otherwise never do.
    """
    if cfg.baseline == "none":
        return rewards
    axis = 1 if cfg.baseline == "group" else None
    centred = rewards - rewards.mean(axis=axis, keepdims=True)
    spread = rewards.std(axis=axis, keepdims=True)
    return jnp.where(spread > 0, centred / jnp.where(spread > 0, spread, 1.0), 0.0)


def sites_of(model: Transformer, spectra: Mapping[str, Any]) -> Any:
    """The `Site` tree of spectra that are keyed by weight name or nested as the model's."""
    is_flat = all(isinstance(spectrum, Spectrum) for spectrum in spectra.values())
    seeds = {name: seed_of(name) for name in (spectra if is_flat else expected(model.cfg))}
    tree = seeds if is_flat else model.nest(seeds)

    def site(path: Any, spectrum: Spectrum) -> Site:
        seed: Any = tree
        for entry in path:
            seed = seed[entry.key]
        return Site(spectrum.s, seed)

    return jax.tree_util.tree_map_with_path(site, spectra, is_leaf=lambda x: isinstance(x, Spectrum))


def reinforce_loss(
    raw: Mapping[str, Any],
    spectra: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    *,
    model: Transformer,
    family: Family,
    cfg: ReinforceConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one batch, and its parts; take the gradient in argument 0 and nowhere else.

        loss = 1/B sum_b ( -advantage_b sum_t log pi_z(y_t) + kl_coef sum_t KL(base || adapted)_t )

    Transformer-Squared (arXiv 2501.06252), equation 1, as its public code has it: sums over the tokens of a
    completion, KL of the base against the adapted model over the whole vocabulary. Prompt tokens get no gradient.
    Deviations: the advantage may have a baseline (`ReinforceConfig`); the caller decides through `completion_mask`
    whether the end token is scored (the public code never does).

    Args:
      raw: the expert's raw values as `family` trains them, {weight name: [R]} for most, or the model's nested tree
        of it.
      spectra: keyed by the same names, or nested as well; whole ones.
      params: base weights.
      batch: B completions.
      model, family, cfg: static.
    Returns:
      (loss [] float32, aux): aux has `policy_loss`, `kl` (nats a completion; 0 where kl_coef is 0), `entropy` (nats a
      completion), and `logprobs` [B, N] (nats, 0 where masked).
    Raises:
      UserError: raw misses an entry, holds a foreign one or one of another shape (named); a truncated spectrum.
    """
    require_whole(spectra)
    sites = sites_of(model, spectra)
    check_raw(family, raw, sites)
    adapted = variables(model, params, adapters(spectra, family.middles(raw, sites)))
    prompts, rows = batch.prompt_ids.shape[0], batch.completion_ids.shape[0]
    positions, valid = positions_of(batch.prompt_mask)
    prompt_lengths = jnp.repeat(batch.prompt_mask.sum(axis=1), rows // prompts)
    offsets, scored = positions_of(batch.completion_mask)

    def predicting(collections: Mapping[str, Any]) -> jax.Array:
        """[B, N, D], the state before each completion token."""
        hidden, past = apply(model, collections, batch.prompt_ids, positions, valid)
        last = jnp.repeat(hidden[:, -1:], rows // prompts, axis=0)
        hidden, _ = apply(model, collections, batch.completion_ids, prompt_lengths[:, None] + offsets, scored, [past])
        return jnp.concatenate([last, hidden[:, :-1]], axis=1)

    ref_hidden = jax.lax.stop_gradient(predicting({"params": params})) if cfg.kl_coef else None
    scores = score(
        lambda h: apply(model, {"params": params}, h, method="unembed"),
        predicting(adapted),
        batch.completion_ids,
        ref_hidden,
    )
    keep = batch.completion_mask.astype(jnp.float32)
    size = batch.advantages.shape[0]
    policy_loss = -jnp.sum(batch.advantages * jnp.sum(scores.logprobs * keep, axis=1)) / size
    kl = jnp.sum(scores.kl * keep) / size
    aux = {
        "policy_loss": policy_loss,
        "kl": kl,
        "entropy": jnp.sum(scores.entropy * keep) / size,
        "logprobs": scores.logprobs * keep,
    }
    return policy_loss + cfg.kl_coef * kl, aux
