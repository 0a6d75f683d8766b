"""The weights that all rows of a batch share, and the adapter that each row has of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct

from sva.models.cache import KVSegment
from sva.models.transformer import Transformer, variables
from sva.spectral.forms import adapters
from sva.spectral.mixing import mixture


@struct.dataclass
class Weights:
    """The base's weights, and how rows get an adapter of their own: `adapter_of(model, shared, values)`.

    `shared` is the same for all rows (a bank, or spectra), `values` differs by row (alphas, or z). Without
    `adapter_of` every row runs on the params alone.
    """

    model: Transformer = struct.field(pytree_node=False)
    params: Mapping[str, Any]
    eos_ids: jax.Array  # [K] int32, -1 where unused
    adapter_of: Callable[[Transformer, Any, Any], Any] | None = struct.field(pytree_node=False, default=None)
    shared: Any = None
    prefix: KVSegment | None = None  # of one row: tokens before every prompt; not where rows have adapters

    @property
    def past(self) -> list[KVSegment]:
        """The segments that come before every row's own."""
        return [] if self.prefix is None else [self.prefix]

    def collections(self, values: Any) -> dict[str, Any]:
        """The variables for rows with these values, whose first axis is B."""
        adapter = None if self.adapter_of is None else self.adapter_of(self.model, self.shared, values)
        return variables(self.model, self.params, adapter)


def bank_mixture(_: Transformer, bank: Any, alphas: jax.Array) -> Any:
    """The adapter of rows that mix a bank's experts: the model's nested tree of `Slots`, alphas [B, E_max]."""
    return mixture(bank, alphas)


def own_factors(model: Transformer, spectra: Any, z: Any) -> Any:
    """The adapter of rows with a z of their own: the model's nested tree of spectra, {weight name: [B, R]}."""
    return adapters(spectra, model.nest(z))
