"""Weights that an effective z changes: merged into dense ones, or as adapters beside them."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sva.adapters.family import Adapter, LinearAdapter
from sva.generation.loaded_model import LoadedModel
from sva.models import layout
from sva.models.transformer import Transformer
from sva.models.weights import split_name, unnest
from sva.spectral import forms
from sva.spectral.cost import cheapest
from sva.spectral.expert import check_z
from sva.spectral.forms import Factored, Spectrum
from sva.spectral.parametrisations import Frozen
from sva.spectral.svd import require_whole
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
    name = f"{lm.name} (merged)"
    if lm.z is not None:  # there are no weights to merge into
        return dataclasses.replace(lm, name=name, z=dict(lm.z) | dict(z))
    params = merge_params(lm.model, lm.params, spectra, z)
    return dataclasses.replace(lm, params=params, name=name, known_fingerprint=None, spectra={})


def merge_params(
    model: Transformer, params: Mapping[str, Any], spectra: Mapping[str, Frozen], z: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameter tree with the weights of z ({name: [R], Core, Bands or Adapter}) replaced by merged ones."""
    named = unnest(params, layout.held(model, params), scan=model.scan_layers)
    targets = {name: (named[name], spectra[name], z) for name, z in z.items()}
    biases = {name: x.merged_bias() for name, x in z.items() if isinstance(x, Adapter)}
    biases = {f"{name.removesuffix('weight')}bias": x for name, x in biases.items() if x is not None}
    return model.nest(named | _merge_all(targets) | biases)


@jax.jit
def _merge_all(targets: dict[str, tuple[Any, Frozen, forms.Z]]) -> dict[str, Any]:
    def merged(w: Any, spectrum: Frozen, z: forms.Z) -> Any:
        if isinstance(w, Int8):
            return quantise_weight(forms.merge(spectrum, z, floats(w, jnp.float32)))
        return forms.merge(spectrum, z, w)

    return {name: merged(*target) for name, target in targets.items()}


def adapted(
    lm: LoadedModel, spectra: Mapping[str, Spectrum], z: Mapping[str, Any], *, tokens: int | None = None
) -> tuple[Mapping[str, Any], dict[str, LinearAdapter] | None]:
    """(params, adapter) that run an effective z, every matrix in its cheapest exact form (`cost.cheapest`).

    Args:
      z: {name: [R] or [B, R]}.
      tokens: that z is used for; None for many.
    Returns:
      The base's params with merged weights where the form is dense, and adapters for the rest or None.
    """
    held = layout.held(lm.model, lm.params)
    by_row = {shared_form(lm.model, name): len(x) for name, x in z.items() if np.ndim(x) == 2}
    merged, adapter = {}, {}
    for name, x in z.items():
        rows = by_row.get(shared_form(lm.model, name))
        form = cheapest(spectra[name], "rows" if rows else "one", tokens=tokens) if name in held else "factored"
        if form == "dense":
            merged[name] = x
            continue
        x = jnp.asarray(x) if rows is None else jnp.broadcast_to(x, (rows, np.shape(x)[-1]))
        adapter[name] = Factored(spectra[name], x) if form == "factored" else forms.delta(spectra[name], x)
    params = merge_params(lm.model, lm.params, spectra, merged) if merged else lm.params
    return params, adapter or None


def factored(spectra: Mapping[str, Spectrum], z: Mapping[str, Any]) -> dict[str, Factored]:
    """The adapter {name: Factored} of an effective z, {name: [R]} or {name: [B, R]}.

    Raises:
      UserError: a truncated spectrum.
    """
    require_whole({name: spectra[name] for name in z})
    return {name: Factored(spectra[name], jnp.asarray(x)) for name, x in z.items()}


def shared_form(model: Transformer, name: str) -> Hashable:
    """The key that weights of one form share: the kind of layer where layers are stacked, else the name itself."""
    layer, path = split_name(name)
    return path if model.scan_layers and layer is not None else name
