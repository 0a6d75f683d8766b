"""A run's arguments as shapes alone: trees of jax.ShapeDtypeStruct, placed on the mesh as the run would place them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from sva.adaptation.adaptive_lm import SLOTS
from sva.adapters.family import Family, Matrix
from sva.models import layout
from sva.models.transformer import Transformer
from sva.models.weights import by_name, expected
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
    mesh: Mesh | AbstractMesh
    prompt: int  # tokens of a prompt
    new: int  # tokens of a completion

    @property
    def platform(self) -> str:
        """Of the mesh's devices; a pod's where there are none."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else "tpu"

    @property
    def targets(self) -> list[str]:
        """Names of the weights that an expert moves."""
        return select(expected(self.model.cfg), self.config.targets, self.config.layers)

    @property
    def member(self) -> Family:
        """The parametrisation."""
        return family(self.config.parametrisation)

    @property
    def decomposed(self) -> frozenset[str]:
        """Names of the targets that a training step runs on their spectra."""
        return frozenset(self.targets if self.member.has_spectra else ())

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
        "spectra": spectra_of(shapes) if shapes.member.has_spectra else _matrices_of(shapes, shapes.model.nest),
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
    """The arrays of the weights' tree in which targets lie: those that merging makes anew."""
    held = flatten_dict(layout.params(shapes.model))
    paths = layout.names_by_path(shapes.targets, shapes.model)
    return layout.abstract(unflatten_dict({path: held[path] for path in paths}), shapes.model.dtype, shapes.mesh)


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
    """The training state, placed as a run places it."""
    cfg, member = shapes.model.cfg, shapes.member
    if member.has_spectra:
        frozen = by_name(spectra_of(shapes), shapes.targets, scan=shapes.model.scan_layers)
    else:
        frozen = _matrices_of(shapes, dict)

    def start() -> Any:
        return init_state(layout.together(shapes.model, _zeros(frozen)), member, update_config(shapes.config.train))

    state = jax.eval_shape(start)
    places = shardings(layout.trained(cfg, member, state), shapes.mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)


def _matrices_of(shapes: Shapes, shaped: Callable[[Any], Any]) -> Any:
    """`shaped` of {weight name: Matrix} of the targets, for a member that reads no spectra."""
    weights, reads = expected(shapes.model.cfg), shapes.member.reads

    def made() -> Any:
        found = {}
        for name in shapes.targets:
            (out, into), module = weights[name].shape, name.removesuffix(".weight")
            norms = jnp.zeros(out, jnp.float32) if "norms" in reads else None
            has_bias = "bias" in reads and f"{module}.bias" in weights
            bias = jnp.zeros(out, shapes.model.dtype) if has_bias else None
            found[name] = Matrix(jnp.zeros((), jnp.uint32), (out, into), module.rpartition(".")[2], norms, bias)
        return shaped(found)

    return jax.tree.map(lambda x: whole(shapes, x.shape, x.dtype), jax.eval_shape(made))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


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
