"""Shape and logical axes (`Leaf`) of everything that lies on a mesh, from the one declaration of weights."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from sva.adapters.family import Family
from sva.models.cache import KV, KVSegment, blocks_of
from sva.models.config import ModelConfig
from sva.models.stacks import stacks
from sva.models.transformer import Transformer
from sva.models.weights import by_name, expected, of_all_modules, path_has_modules, path_of, stack_shape
from sva.parallel.sharding import Leaf, place, sharding, shardings
from sva.spectral.forms import Spectrum
from sva.utils.by_name import ByName


def params(model: Transformer, without: Collection[str] = ()) -> dict[str, Any]:
    """The linen tree of the base weights; `without` the ones named, which some adapter stands in for."""
    return nested(model, {name: leaf for name, leaf in expected(model.cfg).items() if name not in without})


def names_by_path(names: Iterable[str], model: Transformer) -> dict[tuple[str, ...], list[str]]:
    """{path in the linen tree: the weight there, or, in order, those that are stacked there}."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        found.setdefault(path_of(name, model.scan_layers)[0], []).append(name)
    return found


def is_whole(model: Transformer, names: Iterable[str]) -> bool:
    """Whether a tree keyed by these names nests as the model's: of what is stacked, all is there."""

    def count(path: tuple[str, ...], name: str) -> int:
        return math.prod(lead(model, path)[: len(path_of(name, model.scan_layers)[1])])

    return all(len(found) == count(path, found[0]) for path, found in names_by_path(names, model).items())


def together(model: Transformer, named: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is keyed by weight name, with the modules of each layer as one entry [X, ...], named by `of_all_modules`.

    Thousands of small arrays become a few hundred: training's programs take and return them by entry. What holds no
    whole stacks is given back as it is.
    """
    if not isinstance(named, ByName):
        return named
    return by_name(named.tree, dict.fromkeys(map(of_all_modules, named)), scan=model.scan_layers)


def apart(model: Transformer, named: Mapping[str, Any]) -> Mapping[str, Any]:
    """`together` undone: keyed by weight name again, without a copy."""
    if not isinstance(named, ByName):
        return named
    names = [name for name in expected(model.cfg) if name in named or of_all_modules(name) in named]
    return by_name(named.tree, names, scan=model.scan_layers)


def lead(model: Transformer, path: tuple[str, ...]) -> tuple[int, ...]:
    """The first axes of the array at a path of the linen tree: its layers and modules, where they are stacked."""
    return stack_shape(path, model.cfg.num_layers, model.scan_layers, model.cfg.moe and model.cfg.moe.modules)


def has_stacks(model: Transformer, names: Iterable[str]) -> bool:
    """Whether some of these weights are held in a stack."""
    places = (path_of(name, model.scan_layers) for name in names)
    return any(at or path_has_modules(path) for path, at in places)


def held(model: Transformer, tree: Mapping[str, Any]) -> dict[str, Leaf]:
    """{weight name: its Leaf} of the weights that a linen tree of parameters has."""
    paths = flatten_dict(tree).keys()
    weights = expected(model.cfg)
    return {
        name: weights[name] for path, names in names_by_path(weights, model).items() if path in paths for name in names
    }


def spectra(cfg: ModelConfig, names: Iterable[str]) -> dict[str, Spectrum]:
    """{weight name: Spectrum of Leaf}: U has the weight's output axis, V^T its input axis; s is repeated."""
    weights = expected(cfg)
    return {name: spectrum(weights[name], min(weights[name].shape)) for name in names}


def spectrum(weight: Leaf, rank: int) -> Spectrum:
    """The Leafs of one weight's spectrum with `rank` components; the weight is (out, in)."""
    (out, into), (out_axis, in_axis) = weight.shape, weight.axes
    out_units, in_units = weight.units or weight.shape
    return Spectrum(
        Leaf((out, rank), (out_axis, "rank"), (out_units, rank)),
        Leaf((rank,), (None,)),
        Leaf((rank, into), ("rank", in_axis), (rank, in_units)),
    )


def trained(cfg: ModelConfig, member: Family, tree: Any) -> Any:
    """The Leafs of a tree that has raw values in it, as an optimiser's state does, keyed by weight name somewhere.

    A raw array is divided as `member.sides` says; everything else is repeated on every device.
    """
    weights = expected(cfg)

    def one(path: Sequence[Any], x: Any) -> Leaf:
        keys = [str(getattr(entry, "key", "")) for entry in path]
        place = next((i for i, key in enumerate(keys) if key in weights), None)
        sides = None if place is None else member.sides.get("".join(keys[place + 1 :]))
        if place is None or sides is None or len(sides) != len(x.shape):
            return Leaf(x.shape, (None,) * len(x.shape))
        weight = weights[keys[place]]
        out, into = zip(weight.axes, weight.units or weight.shape, strict=True)
        found = [{"out": out, "in": into}.get(side or "", (None, n)) for side, n in zip(sides, x.shape, strict=True)]
        axes, units = zip(*found, strict=True)
        return Leaf(x.shape, axes, units)

    return jax.tree_util.tree_map_with_path(one, tree)


def kv_segment(model: Transformer, rows: int, slots: int) -> KVSegment:
    """The Leafs of the segment that `sva.models.cache.empty` makes, of floats."""
    cfg = model.cfg
    blocks, size = blocks_of(slots, scan=model.scan_layers)
    sizes = [stack.size for stack in stacks(cfg.num_layers, model.scan_layers)]
    lead, axes = (rows, cfg.num_kv_heads), ("batch", "kv_heads", None, None)
    k = (
        Leaf((*lead, blocks, cfg.head_dim, size), (*axes, None))
        if blocks > 1
        else Leaf((*lead, cfg.head_dim, size), axes)
    )
    kv = KV(k, Leaf((*lead, blocks * size, cfg.head_dim), axes))
    marks = Leaf((rows, blocks * size), ("batch", None))
    layers: Any = tuple(stacked(kv, size) for size in sizes) if sizes else (kv,) * cfg.num_layers
    return KVSegment(layers, positions=marks, valid=marks)  # pyright: ignore[reportArgumentType]


def rows(tree: Any) -> Any:
    """The Leafs of a batch's arrays, whose first axis is its rows."""
    return jax.tree.map(lambda x: Leaf(x.shape, ("batch", *(None,) * (x.ndim - 1))), tree)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """A batch (the same on every process) with its rows divided over a mesh; None leaves it where it is."""
    if mesh is None:
        return tree
    return place(jax.tree.map(np.asarray, tree), shardings(rows(tree), mesh))


def nested(model: Transformer, named: Mapping[str, Any]) -> dict[str, Any]:
    """The linen tree of trees of Leaf keyed by weight name: as `model.nest`, stacked layers being a first axis."""
    found = names_by_path(named, model)
    return unflatten_dict({path: in_stack(model, path, named[names[0]]) for path, names in found.items()})


def abstract(tree: Any, dtype: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree of jax.ShapeDtypeStruct of a tree of Leaf on a mesh; the s of a spectrum is float32 whatever `dtype`."""

    def one(leaf: Leaf, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding(leaf, mesh))

    def visit(x: Any) -> Any:
        return Spectrum(one(x.u), one(x.s, jnp.float32), one(x.vt)) if isinstance(x, Spectrum) else one(x)

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, Leaf | Spectrum))


def stacked(tree: Any, count: int, axis: str | None = None) -> Any:
    """The Leafs of so many arrays, stacked on a new first axis."""

    def one(leaf: Leaf) -> Leaf:
        return Leaf((count, *leaf.shape), (axis, *leaf.axes), (count, *(leaf.units or leaf.shape)))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Leaf))


def in_stack(model: Transformer, path: tuple[str, ...], tree: Any) -> Any:
    """The Leafs of what lies at a path of the linen tree, of one weight's; s is repeated, also where modules are not.

    So one module's s is at hand in every process: slicing it sends no message.
    """
    sizes = lead(model, path)
    axes = [*(None,) * (len(sizes) - 1), "moe" if path_has_modules(path) else None]

    def one(leaf: Leaf) -> Leaf:
        is_divided = any(axis is not None for axis in leaf.axes)
        for size, axis in reversed(list(zip(sizes, axes, strict=False))):
            leaf = stacked(leaf, size, axis if is_divided else None)
        return leaf

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Leaf))


def size(tree: Any) -> int:
    """The number of elements in a tree of Leaf."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Leaf)))
