"""A model in memory: its network, weights and tokenizer, and what its weights are called."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sva.models import layout
from sva.models.export import save_checkpoint
from sva.models.fingerprint import digest, fingerprint
from sva.models.transformer import Transformer
from sva.models.weights import unnest
from sva.spectral.forms import Spectrum
from sva.utils.errors import UserError
from sva.utils.matmul import floats

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KV_DTYPES = {**DTYPES, "int8": jnp.int8}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, its weights and its tokenizer.

    `model` is frozen and hashable (static under jit), `params` its linen tree (traced). An LM itself never enters
    jit, nor is it closed over.
    """

    model: Transformer
    params: Mapping[str, Any]
    tokenizer: Any  # a transformers PreTrainedTokenizerFast, or None
    name: str
    quantisation: str | None = None  # of the file that the weights came from
    known_fingerprint: str | None = dataclasses.field(default=None, repr=False)
    mesh: Mesh | None = None  # on which the params lie by the rules of `sva.parallel.sharding`; None: one device
    # Spectra read so far, by weight name; where layers are scanned their stacks, by path in the linen tree.
    spectra: dict[Any, Spectrum] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    z: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)  # of calls that give none

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 over every weight as stored; of weights made in memory, as `save` would store them."""
        if self.known_fingerprint:
            return self.known_fingerprint
        return fingerprint((name, digest(np.asarray(weight))) for name, weight in self.named_params().items())

    def stored_params(self) -> dict[str, Any]:
        """The weights by checkpoint name, as they are stored: matrices of a quantised model as `Int8`."""
        return unnest(self.params, layout.held(self.model, self.params), scan=self.model.scan_layers)

    def named_params(self) -> dict[str, jax.Array]:
        """The weights by checkpoint name; int8 matrices as the floats that they stand for."""
        return {name: floats(weight, self.model.dtype) for name, weight in self.stored_params().items()}

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face checkpoint (config, safetensors, tokenizer) that transformers loads.

        Raises:
          UserError: the directory is not empty, or the disk is full.
        """
        tensors = ((name, np.asarray(weight)) for name, weight in self.named_params().items())
        save_checkpoint(directory, self.model.cfg, tensors, self.tokenizer)


def kept_spectra(model: Transformer, spectra: Mapping[str, Any]) -> dict[Any, Spectrum]:
    """Spectra keyed by weight name as `LoadedModel.spectra` keeps them; a view of stacks is not copied."""
    if not (layout.has_stacks(model, spectra) and layout.is_whole(model, spectra)):
        return dict(spectra)
    stacks: dict[Any, Any] = flatten_dict(model.nest(spectra))
    return stacks


def require_weights(lm: LoadedModel, who: str) -> None:
    """Raises UserError for a model that was loaded `without` its target weights, which `who` needs."""
    if lm.z is not None:
        raise UserError(f"{lm.name} was loaded without its target weights, which {who} needs; load it with them")
