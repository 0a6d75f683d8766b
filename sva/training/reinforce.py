"""Policy gradients on the scale of singular values: the batch, the settings and the loss.

| algorithm   | advantages      | loss of a token  | tokens of a completion | source                        |
|-------------|-----------------|------------------|------------------------|-------------------------------|
| `reinforce` | `baseline`      | -A log pi        | summed                 | Transformer-Squared, its code |
| `rloo`      | `leave_one_out` | -A log pi        | summed                 | arXiv 2402.14740              |
| `grpo`      | `group`         | clipped ratio    | averaged               | arXiv 2402.03300              |
| `dr_grpo`   | `mean`          | clipped ratio    | summed                 | arXiv 2503.20783              |

The public code of Transformer-Squared (SakanaAI/self-adaptive-llms) is `reinforce` with `baseline: none`, one greedy
completion a prompt (`rollout.samples: 1`, `rollout.temperature: 0`) and end tokens not scored. Next-token prediction
is the same loss of given answers, see `sva.training.sft`. Deviation of `dr_grpo`: its paper divides the sum by the
largest number of tokens allowed, a constant that neither the joint clip of the gradient nor Adam sees; without it
kl_coef weighs nats a completion, as in `reinforce`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters.draws import seed_of
from sva.adapters.family import Family, Matrix
from sva.generation.logprobs import Scores, score
from sva.generation.weights import base_variables
from sva.models import moe
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.models.weights import expected
from sva.spectral.forms import adapters
from sva.spectral.parametrisations import Frozen, MatrixInfo, check_raw
from sva.spectral.svd import require_whole
from sva.training import losses
from sva.training.advantages import BASELINES
from sva.training.config.reinforce import ALGORITHMS, ReinforceConfig
from sva.utils.by_name import ByName
from sva.utils.errors import UserError

LOAD = "moe_load"  # among the metrics of a mixture of experts


@struct.dataclass
class Batch:
    """B completions of P prompts with their advantages; completion r answers prompt r // (B / P).

    Prompts are padded on the left, completions on the right. With several completions a prompt, the prompt is
    computed once, forwards and backwards.

    The policy of a row is softmax(logits / temperature), the one that its completion was drawn from; `sampled`, the
    loss, the KL to the base and the entropy are all of it. `sva.training.rollout` sets it from `rollout.temperature`.
    """

    prompt_ids: jax.Array  # [P, T] int32
    prompt_mask: jax.Array  # [P, T] int32
    completion_ids: jax.Array  # [B, N] int32
    completion_mask: jax.Array  # [B, N] int32, 1 for the tokens that are read and scored: the first ones of a row
    advantages: jax.Array  # [B] float32, unitless; the reward itself where there is no baseline
    sampled: jax.Array | None = (
        None  # [B, N] float32 nats, log-probs under the policy that drew; None: nothing was drawn
    )
    temperature: jax.Array | float | None = None  # [B] float32 above 0, or one for all rows; None: 1
    noise: jax.Array | None = None  # [P] uint32 seeds, the first of a micro-batch its dropout's; None: no dropout


def advantages(rewards: jax.Array, cfg: ReinforceConfig) -> jax.Array:
    """[P, G] advantages of rewards [P, G], G samples a prompt, as the algorithm has them; see `training.advantages`."""
    return BASELINES[cfg.baseline_name](rewards)


def matrix_infos_of(model: Transformer, spectra: Mapping[str, Any]) -> Any:
    """The tree of infos of spectra (or `Matrix`) that are keyed by weight name or nested as the model's."""
    is_flat = all(isinstance(one, Frozen) for one in spectra.values())
    seeds = {name: seed_of(name) for name in (spectra if is_flat else expected(model.cfg))}
    tree = seeds if is_flat else model.nest(seeds)

    def info(path: Any, one: Frozen) -> MatrixInfo | Matrix:
        if isinstance(one, Matrix):
            return one
        seed: Any = tree
        for entry in path:
            seed = seed[entry.key]
        return MatrixInfo(one.s, seed)

    return jax.tree_util.tree_map_with_path(info, spectra, is_leaf=lambda x: isinstance(x, Frozen))


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

        loss = 1/B sum_b sum_t ( -advantage_b log pi_z(y_t) + kl_coef KL_t )

    for `reinforce`, which is Transformer-Squared (arXiv 2501.06252), equation 1, as its public code has it: sums
    over the tokens of a completion, KL of the base against the adapted model over the whole vocabulary. The table
    in this module's docstring says what the other algorithms put in its place. Prompt tokens get no gradient. pi_z
    and the base are softmax(logits / batch.temperature), so that over completions drawn at a temperature the mean
    gradient is that of the expected reward of what was drawn from; a cut (top-k, top-p, min-p) has no place in it.
    Deviations: the advantage may have a baseline (`ReinforceConfig`); the caller decides through `completion_mask`
    whether the end token is scored (the public code never does).

    Args:
      raw: the expert's raw values as `family` trains them, {weight name: [R]} for most, or nested as the model's.
      spectra: as `sva.decompose` gives them, or nested as well; whole ones, or `Matrix` for a family without.
      params: base weights; where target weights are left out, their spectra stand in for them.
      batch: B completions.
      model: static under jit, as the next two.
      family: the parametrisation of raw.
      cfg: settings of the loss.
    Returns:
      (loss [] float32, aux): aux has `policy_loss`, `kl` (nats a completion, of what kl_coef weighs; 0 where it is not
      computed), `entropy` (nats a completion, of the policy at its temperature), `clipped` (tokens a completion whose
      gradient the clip stopped), and `logprobs` [B, N] (nats at that temperature, 0 where masked); of a mixture of
      experts also `moe_load`, how many times its fair part a layer's busiest module gets of the completions' tokens.
    Raises:
      UserError: raw misses an entry, holds a foreign one or one of another shape (named); a truncated spectrum; a
        clipped ratio without the log-probs that the batch was sampled with.
    """
    raw, spectra = (model.nest(x) if isinstance(spectra, ByName) else x for x in (raw, spectra))
    require_whole(spectra)
    infos = matrix_infos_of(model, spectra)
    check_raw(family, raw, infos)
    z = family.z(raw, infos)
    if batch.noise is not None:
        z = family.noisy(z, infos, batch.noise[0])
    adapted = variables(model, params, adapters(spectra, z))
    base = base_variables(model, params, spectra)
    ref_hidden = jax.lax.stop_gradient(hidden_before_tokens(model, base, batch)[0]) if cfg.has_kl else None

    def unembed(hidden: jax.Array) -> jax.Array:
        """[B, n, V] logits at the temperature of each row."""
        logits = apply(model, base, hidden, method="unembed")
        return logits if batch.temperature is None else logits / jnp.reshape(batch.temperature, (-1, 1, 1))

    hidden, routed = hidden_before_tokens(model, adapted, batch)
    loss, aux = policy_loss(score(unembed, hidden, batch.completion_ids, ref_hidden), batch, cfg)
    if model.cfg.moe is not None:
        aux[LOAD] = moe.largest_load(routed, batch.completion_mask > 0, model.cfg.moe.modules)
    return loss, aux


def hidden_before_tokens(
    model: Transformer, collections: Mapping[str, Any], batch: Batch
) -> tuple[jax.Array, Mapping[str, Any]]:
    """([B, N, D] hidden states that predict each completion token, the modules that the completions were routed to).

    A prompt's states are computed once for its completions. Of a model without modules the second is empty.
    """
    samples = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    positions, valid = positions_of(batch.prompt_mask)
    offsets, scored = positions_of(batch.completion_mask)
    output_start = batch.prompt_ids.shape[1] - 1
    hidden, past = apply(model, collections, batch.prompt_ids, positions, valid, output_start=output_start)
    last = jnp.repeat(hidden, samples, axis=0)
    starts = jnp.repeat(batch.prompt_mask.sum(axis=1), samples)
    positions = starts[:, None] + offsets
    (hidden, _), sown = apply(
        model, collections, batch.completion_ids, positions, scored, [past], mutable=[moe.COLLECTION]
    )
    return jnp.concatenate([last, hidden[:, :-1]], axis=1), sown.get(moe.COLLECTION, {})


def policy_loss(scores: Scores, batch: Batch, cfg: ReinforceConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`reinforce_loss` of completions that are scored already: any policy's, not only a language model's."""
    algorithm = ALGORITHMS[cfg.algorithm]
    keep = batch.completion_mask.astype(jnp.float32)
    share = keep / jnp.maximum(keep.sum(axis=1, keepdims=True), 1) if algorithm.is_averaged else keep
    size = batch.advantages.shape[0]
    # Masked tokens hold anything; as zeros they cannot make an infinite ratio, which a weight of 0 would not undo.
    scores = scores._replace(logprobs=scores.logprobs * keep, ref_logprobs=scores.ref_logprobs * keep)
    clipped = jnp.zeros_like(keep)
    if not algorithm.is_clipped:
        surrogate = losses.score_function(scores.logprobs, batch.advantages)
    elif batch.sampled is None:
        raise UserError(
            f"algorithm {cfg.algorithm} needs batch.sampled, the log-probs that completions were drawn with"
        )
    else:
        surrogate, is_clipped = losses.clipped_ratio(
            scores.logprobs, batch.sampled * keep, batch.advantages, cfg.clip_low, cfg.clip_high
        )
        clipped = is_clipped.astype(jnp.float32)
    loss = jnp.sum(surrogate * share) / size
    aux = {
        "policy_loss": loss,
        "kl": jnp.zeros(()),
        "entropy": jnp.sum(scores.entropy * keep) / size,
        "clipped": jnp.sum(clipped * keep) / size,
        "logprobs": scores.logprobs,
    }
    if cfg.has_kl:
        penalties = losses.penalty(scores, keep, cfg.kl)
        loss = loss + cfg.kl_coef * jnp.sum(penalties * share) / size
        aux["kl"] = jnp.sum(penalties * keep) / size
    return loss, aux
