"""The weights that all rows of a batch share, and the adapter that each row has of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from sva.models.cache import KVSegment
from sva.models.transformer import Transformer, variables
from sva.spectral.forms import Factored, adapters
from sva.spectral.mixing import mixture


@struct.dataclass
class Weights:
    """The base's weights, and how rows get an adapter of their own: `adapter_of(model, shared, values)`.

    `shared` is the same for all rows (a bank, or spectra), `values` differs by row (alphas, or z). Without
    `adapter_of` all rows run on the params alone, or with the one `adapter`.
    """

    model: Transformer = struct.field(pytree_node=False)
    params: Mapping[str, Any]
    eos_ids: jax.Array  # [K] int32, -1 where unused
    adapter: Any = None  # the model's nested tree of it, the same for all rows
    adapter_of: Callable[[Transformer, Any, Any], Any] | None = struct.field(pytree_node=False, default=None)
    shared: Any = None
    prefix: KVSegment | None = None  # of one row: tokens before every prompt; not where rows have adapters

    @property
    def past(self) -> list[KVSegment]:
        """The segments that come before every row's own."""
        return [] if self.prefix is None else [self.prefix]

    def collections(self, values: Any) -> dict[str, Any]:
        """The variables for rows with these values, whose first axis is B."""
        of_rows = None if self.adapter_of is None else self.adapter_of(self.model, self.shared, values)
        adapter = self.adapter if of_rows is None else of_rows
        return variables(self.model, self.params, adapter)


def base_variables(model: Transformer, params: Mapping[str, Any], spectra: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the base model: its weights, and spectra at z = 1 in place of those that `params` lacks.

    Args:
      spectra: keyed by weight name, or nested as the model's.
    """
    held = flatten_dict(dict(params)).keys()
    of_path: dict[Any, Any] = flatten_dict(model.nest(spectra))
    absent = {path: Factored(x, jnp.ones_like(x.s)) for path, x in of_path.items() if path not in held}
    return variables(model, params, unflatten_dict(absent) if absent else None)


def bank_mixture(_: Transformer, bank: Any, alphas: jax.Array) -> Any:
    """The adapter of rows that mix a bank's experts: the model's nested tree of `Slots`, alphas [B, E_max]."""
    return mixture(bank, alphas)


def own_factors(model: Transformer, spectra: Any, z: Any) -> Any:
    """The adapter of rows with a z of their own: the model's nested tree of spectra, {weight name: [B, R]}."""
    return adapters(spectra, model.nest(z))
