"""A run's arguments as shapes alone: trees of jax.ShapeDtypeStruct, placed on the mesh as the run would place them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sva.adaptation.adaptive_lm import SLOTS
from sva.models import layout
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.sharding import Leaf, replicated, shardings
from sva.spectral.forms import Spectrum
from sva.spectral.parametrisations import family
from sva.training.config import Config
from sva.training.optimizers import update_config
from sva.training.update import init_state
from sva.utils.trees import select


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A run's model and sizes."""

    config: Config
    model: Transformer
    mesh: Mesh
    prompt: int  # tokens of a prompt
    new: int  # tokens of a completion

    @property
    def targets(self) -> list[str]:
        """Names of the weights that an expert moves."""
        return select(expected(self.model.cfg), self.config.targets)

    @property
    def is_factored(self) -> bool:
        """Whether spectra stand in for the target weights."""
        return self.config.rollout.form == "factored"


def run_holds(shapes: Shapes) -> dict[str, Any]:
    """What lies on the devices all through a training run, by kind, as trees of jax.ShapeDtypeStruct.

    In the factored form the spectra stand in for the target weights. Merged weights are there in the rollout alone.
    """
    return {
        "weights": params_of(shapes, without_targets=shapes.is_factored),
        "spectra": spectra_of(shapes),
        "state": state_of(shapes),
    }


def held_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded jax.ShapeDtypeStruct on one device, without the padding of layouts."""

    def one(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def params_of(shapes: Shapes, *, without_targets: bool) -> Any:
    """The model's weights; `without_targets` leaves out those that spectra stand in for."""
    without = frozenset(shapes.targets) if without_targets else frozenset()
    return layout.abstract(layout.params(shapes.model, without), shapes.model.dtype, shapes.mesh)


def targets_of(shapes: Shapes) -> Any:
    """The target weights alone, by name."""
    weights = expected(shapes.model.cfg)
    return layout.abstract({name: weights[name] for name in shapes.targets}, shapes.model.dtype, shapes.mesh)


def spectra_of(shapes: Shapes) -> Any:
    """Spectra of the target weights, nested as the model's parameters."""
    named = layout.spectra(shapes.model.cfg, shapes.targets)
    return layout.abstract(layout.nested(shapes.model, named), shapes.model.dtype, shapes.mesh)


def z_of(shapes: Shapes) -> Any:
    """Effective z of one expert, nested."""
    return jax.tree.map(lambda x: x.s, spectra_of(shapes), is_leaf=lambda x: isinstance(x, Spectrum))


def bank_of(shapes: Shapes) -> Any:
    """Effective z of a bank of experts, nested: [L, E_max, R]."""
    return jax.tree.map(
        lambda x: whole(shapes, (*x.shape[:-1], SLOTS, x.shape[-1]), jnp.float32),
        z_of(shapes),
    )


def state_of(shapes: Shapes) -> Any:
    """The training state, replicated."""
    named = layout.spectra(shapes.model.cfg, shapes.targets)
    spectra = layout.abstract(named, shapes.model.dtype, shapes.mesh)
    member = family(shapes.config.parametrisation)
    state = jax.eval_shape(lambda: init_state(_zeros(spectra), member, update_config(shapes.config.train)))
    return jax.tree.map(lambda x: whole(shapes, x.shape, x.dtype), state)


def _zeros(spectra: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spectra)


def cache_of(shapes: Shapes, rows: int, slots: int) -> Any:
    """The key/value cache as `sva.models.cache.empty` makes it."""
    leaves = layout.kv_segment(shapes.model, rows, slots)

    def of(tree: Any, dtype: Any) -> Any:
        return layout.abstract(tree, dtype, shapes.mesh)

    return dataclasses.replace(
        leaves,
        kv=of(leaves.kv, shapes.model.kept_dtype),
        positions=of(leaves.positions, jnp.int32),
        valid=of(leaves.valid, jnp.bool_),
    )


def rows_of(shapes: Shapes, *shape: int, dtype: Any = jnp.int32) -> Any:
    """An array whose first axis is the batch, divided over the mesh's batch axes."""
    leaf = Leaf(shape, ("batch", *(None,) * (len(shape) - 1)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=shardings(leaf, shapes.mesh))


def whole(shapes: Shapes, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array that every device holds whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(shapes.mesh))


def keys_of(shapes: Shapes, rows: int) -> Any:
    """One typed random key a row."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows_of(shapes, rows).sharding)
