"""Weights that an effective z changes: merged into dense ones, or as adapters beside them."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sva.adapters.family import Adapter
from sva.generation.loaded_model import LoadedModel, kept_spectra
from sva.models import layout
from sva.models.transformer import Transformer
from sva.models.weights import path_of
from sva.spectral import forms
from sva.spectral.cost import cheapest
from sva.spectral.expert import check_z
from sva.spectral.forms import Factored, Spectrum
from sva.spectral.mixing import DeltaSlots, FactoredSlots, slots
from sva.spectral.parametrisations import Frozen
from sva.spectral.serving_plan import Plan
from sva.spectral.svd import require_whole
from sva.utils.by_name import ByName
from sva.utils.matmul import Int8, floats, quantise_weight

_Model = TypeVar("_Model", bound=LoadedModel)


def merge(lm: _Model, spectra: Mapping[str, Frozen], z: Mapping[str, Any]) -> _Model:
    """An LM whose target weights are U diag(s z) V^T, dense; everything else is shared with `lm`.

    `spectra` are of the weights that `lm` holds: a weight whose z is 1 throughout stays as it is bit for bit, and so
    does what a truncated spectrum leaves out. An IA3 expert changes the layers' biases as well.

    Args:
      spectra: of the weights of z; for an expert without spectra what `sva.frozen` gives.
      z: {name: [R]}, or what `Expert.z` gives for any parametrisation.
    Raises:
      UserError: a z of the wrong length, with NaN, or without a spectrum.
    """
    check_z(z, spectra)
    return merge_unchecked(lm, spectra, z)


def merge_unchecked(lm: _Model, spectra: Mapping[str, Frozen], z: Mapping[str, Any]) -> _Model:
    """`merge` of values that training made, which fit and may lie on several processes' devices."""
    name = f"{lm.name} (merged)"
    if lm.z is not None:  # there are no weights to merge into
        return dataclasses.replace(lm, name=name, z=dict(lm.z) | dict(z))
    params = merge_params(lm.model, lm.params, spectra, z)
    return dataclasses.replace(lm, params=params, name=name, known_fingerprint=None, spectra={})


def with_z(lm: _Model, spectra: Mapping[str, Any], z: Mapping[str, Any]) -> _Model:
    """An LM that runs factored on these spectra in every call, with this z; all else, its weights too, is `lm`'s."""
    return dataclasses.replace(lm, z=dict(z), spectra=kept_spectra(lm.model, spectra))


def merge_params(
    model: Transformer, params: Mapping[str, Any], spectra: Mapping[str, Frozen], z: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameter tree with the weights of z ({name: [R], Core, Bands or Adapter}) replaced by merged ones.

    All other arrays are those of `params`. Weights that are stacked are merged as a stack, one after another.
    """
    if not z:
        return dict(params)
    weights: dict[Any, Any] = flatten_dict(dict(params))
    if layout.is_whole(model, z):
        factors, scales = _factors(model, spectra, z), flatten_dict(model.nest(z))
        targets = {path: (weights[path], factors[path], z) for path, z in scales.items()}
        return unflatten_dict(weights | _merge_all(targets) | _biases(scales))
    for path, names in layout.names_by_path(z, model).items():  # of stacks, single weights
        for name in names:
            _, at = path_of(name, model.scan_layers)
            target = {path: (jax.tree.map(lambda x, at=at: x[at], weights[path]), spectra[name], z[name])}
            for where, new in (_merge_all(target) | _biases({path: z[name]})).items():
                weights[where] = jax.tree.map(lambda x, y, at=at: x.at[at].set(y), weights[where], new)
    return unflatten_dict(weights)


def _factors(model: Transformer, spectra: Mapping[str, Frozen], names: Iterable[str]) -> dict[Any, Any]:
    """{path in the linen tree: its spectrum, or the stack of them} of these weights, and perhaps of others."""
    named = spectra if isinstance(spectra, ByName) else {name: spectra[name] for name in names}
    return flatten_dict(model.nest(named))


def _biases(scales: Mapping[Any, Any]) -> dict[Any, Any]:
    """{path: the layer's bias} of those that an adapter, or a stack of them, changes."""
    found = {(*path[:-1], "bias"): z.merged_bias() for path, z in scales.items() if isinstance(z, Adapter)}
    return {path: bias for path, bias in found.items() if bias is not None}


@jax.jit
def _merge_all(targets: dict[Any, tuple[Any, Frozen, forms.Z]]) -> dict[Any, Any]:
    def merged(w: Any, spectrum: Frozen, z: forms.Z) -> Any:
        if isinstance(w, Int8):
            return quantise_weight(forms.merge(spectrum, z, floats(w, jnp.float32)))
        return forms.merge(spectrum, z, w)

    def each(target: tuple[Any, Frozen, forms.Z]) -> Any:
        is_stack = max(x.ndim for x in jax.tree.leaves(target[0])) > 2
        return jax.lax.map(each, target) if is_stack else merged(*target)

    return {path: each(target) for path, target in targets.items()}


def adapted(
    lm: LoadedModel, spectra: Mapping[str, Spectrum], z: Mapping[str, Any], *, tokens: int | None = None
) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """(params, nested adapter) that run an effective z, every matrix in its cheapest exact form (`cost.cheapest`).

    Args:
      z: {name: [R] or [B, R]}.
      tokens: that z is used for; None for many.
    Returns:
      The base's params with merged weights where the form is dense, and adapters for the rest or None.
    """
    held = layout.held(lm.model, lm.params)
    by_row = {shared_form(lm.model, name): len(x) for name, x in z.items() if np.ndim(x) == 2}
    merged, factored_z, adapter = {}, {}, {}
    for name, x in z.items():
        rows = by_row.get(shared_form(lm.model, name))
        form = cheapest(spectra[name], "rows" if rows else "one", tokens=tokens) if name in held else "factored"
        if form == "dense":
            merged[name] = x
            continue
        x = jnp.asarray(x) if rows is None else jnp.broadcast_to(x, (rows, np.shape(x)[-1]))
        if form == "factored":
            factored_z[name] = x
        else:
            adapter[name] = forms.delta(spectra[name], x)
    params = merge_params(lm.model, lm.params, spectra, merged) if merged else lm.params
    nested = flatten_dict(lm.model.nest(adapter)) | flatten_dict(nested_factors(lm.model, spectra, factored_z))
    return params, unflatten_dict(nested) if nested else None


def nested_factors(model: Transformer, spectra: Mapping[str, Spectrum], z: Mapping[str, Any]) -> dict[str, Any]:
    """The model's nested tree of `Factored` of an effective z, {name: [R] or [B, R]}; it holds the spectra's arrays."""
    factors, scales = _factors(model, spectra, z), flatten_dict(model.nest(z))
    require_whole(unflatten_dict({path: factors[path] for path in scales}))
    return unflatten_dict({path: Factored(factors[path], jnp.asarray(x)) for path, x in scales.items()})


def factored(spectra: Mapping[str, Spectrum], z: Mapping[str, Any]) -> dict[str, Factored]:
    """The adapter {name: Factored} of an effective z, {name: [R]} or {name: [B, R]}.

    Raises:
      UserError: a truncated spectrum.
    """
    require_whole({name: spectra[name] for name in z})
    return {name: Factored(spectra[name], jnp.asarray(x)) for name, x in z.items()}


def nested_slots(
    model: Transformer, spectra: Mapping[str, Spectrum], bank: Mapping[str, Any], plans: Mapping[str, Plan]
) -> dict[str, Any]:
    """The model's nested tree of `mixing.slots`; factored ones hold the spectra's own arrays, stacked or not."""
    if not isinstance(spectra, ByName):
        return model.nest(slots(spectra, bank, plans))
    numbered = {name: (z, jnp.asarray(place, jnp.int32)) for place, (name, z) in enumerate(bank.items())}
    alone = {name: pair for name, pair in numbered.items() if plans[name].form == "factored"}
    changed = {
        name: DeltaSlots(forms.delta(spectra[name], z, plans[name].components), place)
        for name, (z, place) in numbered.items()
        if name not in alone
    }
    factors: dict[Any, Any] = flatten_dict(dict(spectra.tree))
    pairs: dict[Any, Any] = flatten_dict(model.nest(alone))
    made = {path: FactoredSlots(factors[path], *pair) for path, pair in pairs.items()}
    return unflatten_dict(flatten_dict(model.nest(changed)) | made)


def shared_form(model: Transformer, name: str) -> Hashable:
    """The key that weights of one form share: their stack where they are stacked, else the name itself."""
    path, at = path_of(name, model.scan_layers)
    return path if at else name
