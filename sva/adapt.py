"""Two passes as one jitted function: decide which expert each prompt needs, then answer with it.

Transformer-Squared (arXiv 2501.06252), section 3.2. All prompts of a batch run at once, each with its own mixture of
the bank's experts; shapes depend only on the batch, the prompt buckets, max_new_tokens, the number of labels and
E_max, so another batch, another expert or another mixture meets a compiled program.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from sva.dispatch import Decision, FirstPass, decide, label_scores
from sva.generate import Generation, generate
from sva.models.transformer import Transformer
from sva.sampling import Sampling
from sva.spectral.expert import mix_rows
from sva.spectral.forms import Factored


class Prompts(NamedTuple):
    """One batch of prompts as [B, T] int32 ids and masks, padded on the left."""

    ids: jax.Array
    mask: jax.Array


class TwoPass(NamedTuple):
    """What both passes gave."""

    decision: Decision
    generation: Generation


def mixture(spectra: Mapping[str, Any], bank: Mapping[str, Any], alphas: jax.Array) -> dict[str, Any]:
    """The adapter in which row b runs on 1 + sum_e alphas[b, e] (bank[e] - 1).

    Args:
      spectra: the model's nested tree.
      bank: of the same structure, [E_max, R] a weight (scanned: [L, E_max, R]).
      alphas: [B, E_max].
    """

    def one(rows: jax.Array, spectrum: Any) -> Factored:
        stacked = rows.ndim == 3
        z = jax.vmap(mix_rows, (0, None))(rows, alphas) if stacked else mix_rows(rows, alphas)
        return Factored(spectrum, z)

    return jax.tree.map(one, bank, spectra)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def answer(
    model: Transformer,
    params: Mapping[str, Any],
    spectra: Mapping[str, Any],
    bank: Mapping[str, Any],
    alphas: jax.Array,
    prompts: Prompts,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Generation:
    """The second pass alone, with the mixtures given: alphas [B, E_max]. The rest as in `two_pass`."""
    return generate(
        model,
        params,
        prompts.ids,
        prompts.mask,
        limit,
        eos_ids,
        keys,
        mixture(spectra, bank, alphas),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )


@partial(jax.jit, static_argnames=("model",))
def choose(
    model: Transformer,
    params: Mapping[str, Any],
    spectra: Mapping[str, Any],
    bank: Mapping[str, Any],
    first: FirstPass,
    classifier: jax.Array | None,
    asked: Prompts,
) -> Decision:
    """The first pass alone; arguments as in `two_pass`."""
    adapter = None if classifier is None else mixture(spectra, bank, classifier[None, :])
    scores = label_scores(model, params, first, asked.ids, asked.mask, adapter)
    slots = jax.tree.leaves(bank)[0].shape[-2]
    return decide(scores, first, slots)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def two_pass(
    model: Transformer,
    params: Mapping[str, Any],
    spectra: Mapping[str, Any],
    bank: Mapping[str, Any],
    first: FirstPass,
    classifier: jax.Array | None,
    asked: Prompts,
    prompts: Prompts,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> TwoPass:
    """Both passes over one batch.

    Args:
      model, params: the base model; model is static.
      spectra: `model.nest` of the target weights' spectra.
      bank: `model.nest` of `sva.bank(...)`: [E_max, R] a weight, slot 0 the base.
      first: from `dispatch.prepare`.
      classifier: [E_max] mixture that the first pass itself runs on (the paper's classification expert), or None for
        the base model (its prompt dispatcher). Must be what `first` was prepared with.
      asked: the prompts inside the classification question (`dispatch.encode`), B rows.
      prompts: the same prompts by themselves, B rows.
      limit, eos_ids, keys, max_new_tokens, sampling: as for `generate`.
    """
    decision = choose(model, params, spectra, bank, first, classifier, asked)
    generation = answer(
        model,
        params,
        spectra,
        bank,
        decision.alphas,
        prompts,
        limit,
        eos_ids,
        keys,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    return TwoPass(decision, generation)
