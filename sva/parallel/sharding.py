"""Where arrays lie on a mesh: one table from logical axes to mesh axes.

| mesh axis | what it divides                                                                                      |
|-----------|------------------------------------------------------------------------------------------------------|
| `data`    | rows of a batch; weights are repeated                                                                |
| `fsdp`    | rows of a batch, and of every matrix the model's width, so that weights are gathered as they are used |
| `tensor`  | heads, mlp width and vocabulary; activations are exchanged                                           |
| `moe`     | rows of a batch, and modules of a mixture of experts, to which rows of other devices are sent         |

Weights say their logical axes in `sva.models.weights.expected`; a spectrum's follow from its weight's: U has the output
axis, V^T the input axis, and the axis of singular values between them takes what the other one leaves free. Vectors
(s, z, norms, biases) are repeated on every device: sharded they would save nothing and cost a message each.

The axes are Auto: XLA places what lies between, held by `constrain` at a few spots of the model. Explicit axes were
weighed and left: with weights sharded over `fsdp`, every product of the model contracts a sharded with an unsharded
axis, so `sva.spectral.forms`, which knows no mesh, and every reshape into heads would have to name a sharding.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sva.parallel.mesh_config import MeshConfig
from sva.utils.errors import UserError
from sva.utils.padding import batch_bucket, round_up

AXES = ("data", "fsdp", "tensor")

# Read from the top for each array: a dimension takes the first entry of its name whose mesh axes are still free in that
# array and divide it; axes that the mesh lacks count for nothing. One that gets none is repeated on every device.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("moe", ("moe",)),
    ("batch", ("data", "moe", "fsdp")),
    ("batch", ("data", "fsdp")),
    ("rows", ("data", "moe")),  # of a batch whose width is sharded: see `hidden_axes`
    ("rows", ("data",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("rank", ("fsdp",)),
    ("rank", ("tensor",)),
)


_ROWS = next(axes for name, axes in RULES if name == "batch")


class Leaf(NamedTuple):
    """One array's shape, the logical axis of each dimension (None: repeated), and how many parts it may fall into."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    units: tuple[int, ...] = ()  # of each dimension, e.g. heads where heads * head_dim numbers lie; () for the shape


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, with the axes of a `MeshConfig`; of the first one for 1 x 1 x 1.

    Raises:
      UserError: the axes do not make the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = _sizes(cfg, len(found))
    if math.prod(sizes) == 1 and jax.process_count() == 1:
        found = found[:1]
    _check_count(cfg, sizes, len(found))
    return jax.make_mesh(sizes, tuple(cfg.sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=found)


def abstract_mesh(cfg: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of so many devices that are not there, to count bytes on.

    Raises:
      UserError: the axes do not make the number of devices.
    """
    sizes = _sizes(cfg, devices)
    if math.prod(sizes) > 1:  # else one of them is taken
        _check_count(cfg, sizes, devices)
    return AbstractMesh(sizes, tuple(cfg.sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """The sizes of the axes, an open one filled."""
    sizes = list(cfg.sizes.values())
    if -1 in sizes:
        given = -math.prod(sizes)
        if devices % given:
            raise UserError(f"{cfg} does not divide {devices} devices: {given} is not a divisor; change one axis")
        sizes[sizes.index(-1)] = devices // given
    return tuple(sizes)


def _check_count(cfg: MeshConfig, sizes: tuple[int, ...], devices: int) -> None:
    if math.prod(sizes) != devices:
        raise UserError(
            f"{cfg} makes {math.prod(sizes)} devices, but there are {devices}; their product must be that, or give "
            "one axis as -1"
        )


@contextlib.contextmanager
def on_mesh(cfg: MeshConfig) -> Iterator[Mesh | None]:
    """`make_mesh`, set for the block (`jax.set_mesh`); for one device nothing is set, and there is None."""
    mesh = make_mesh(cfg)
    if mesh.size == 1:
        yield None
        return
    with jax.set_mesh(mesh):
        yield mesh


def partition(leaf: Leaf, mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of one array: every axis by `RULES`, repeated where nothing fits."""
    return P(*(axes[0] if axes and len(axes) == 1 else axes for axes in _chosen(leaf, mesh)))


def sharding(leaf: Leaf, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`partition` on a mesh."""
    return NamedSharding(mesh, partition(leaf, mesh))


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree of shardings of a tree of `Leaf`."""
    return jax.tree.map(lambda leaf: sharding(leaf, mesh), tree, is_leaf=_is_leaf)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """On every device in full."""
    return NamedSharding(mesh, P())


def notes(tree: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """One line for each logical axis of a tree of `Leaf` that a mesh axis ought to divide and does not."""
    lines: dict[str, None] = {}
    for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf):
        chosen = _chosen(leaf, mesh)
        for axis, size, axes in zip(leaf.axes, leaf.units or leaf.shape, chosen, strict=True):
            wanted = next((axes for name, axes in RULES if name == axis), None)
            if axes is None and wanted and (parts := _parts(wanted, mesh)) > 1 and size % parts:
                told = f"{axis} ({size}) is repeated: {' x '.join(wanted)} = {parts} does not divide it"
                lines[f"{told}; choose a divisor of {size}"] = None
    return sorted(lines)


def constrain(x: jax.Array, *axes: str | None, units: tuple[int, ...] = ()) -> jax.Array:
    """x, with the sharding of these logical axes where a mesh is set (`jax.set_mesh`); otherwise x itself.

    `units` as in `Leaf`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(Leaf(x.shape, axes, units), mesh))


def is_divided() -> bool:
    """Whether a mesh is set that divides the rows of a batch."""
    return row_shards() > 1


def repeat_all(tree: Any) -> Any:
    """A tree of arrays, each constrained to lie on every device in full."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def hidden_axes(length: int) -> tuple[str | None, str | None, str | None]:
    """Logical axes of hidden states [B, T, D].

    Of many tokens the rows are divided, and weights come to them. Of one token a row (decoding) the states are the
    smaller side by far: they go to where the weights lie, divided over the width.
    """
    return ("batch", None, None) if length > 1 else ("rows", None, "embed")


def inner_axes(length: int) -> tuple[str | None, str | None, str | None]:
    """Logical axes of what lies between two factors of a weight, [B, T, R], by T as in `hidden_axes`.

    They must be named: left to itself, XLA (jaxlib 0.10.2) divides the components of many tokens over `tensor`, and on
    a mesh whose three axes all have devices its product of rows over data x fsdp with a factor over fsdp x tensor then
    has rows in the places of others.
    """
    return ("batch", None, None) if length > 1 else ("rows", None, "rank")


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return _parts(_ROWS, mesh)


def row_axes(rows: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that so many rows of a batch are divided over; none where they lie on every device."""
    (axes,) = _chosen(Leaf((rows,), ("batch",)), mesh)
    return axes or ()


def row_shards() -> int:
    """Into how many parts the mesh that is set divides the rows of a batch; 1 where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def rows_bucket(rows: int) -> int:
    """`batch_bucket` of so many rows, and more until the mesh that is set divides them."""
    return round_up(batch_bucket(rows), row_shards())


def check_rows(name: str, rows: int, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises UserError unless the setting `name` = `rows` divides evenly over the mesh; None is one device."""
    if mesh is not None and rows % (parts := batch_shards(mesh)):
        axes = " x ".join(f"mesh.{axis}" for axis in _present(_ROWS, mesh))
        raise UserError(f"{name}={rows} does not divide over {axes} = {parts}; make it a multiple of {parts}")


def place(tree: Any, target: Any) -> Any:
    """A tree of arrays (the same on every process) moved to a tree of shardings, each device getting its part."""

    def one(x: Any, to: NamedSharding) -> jax.Array:
        if to.is_fully_addressable:
            return jax.device_put(x, to)
        return jax.make_array_from_callback(x.shape, to, lambda index: x[index])

    return jax.tree.map(one, tree, target)


def _chosen(leaf: Leaf, mesh: Mesh | AbstractMesh) -> list[tuple[str, ...] | None]:
    """The mesh axes of each dimension, None where it is repeated."""
    chosen: list[tuple[str, ...] | None] = [None] * len(leaf.shape)
    used: set[str] = set()
    for name, wanted in RULES:
        axes = _present(wanted, mesh)
        parts = _parts(axes, mesh)
        for place, (axis, size) in enumerate(zip(leaf.axes, leaf.units or leaf.shape, strict=True)):
            if axis == name and chosen[place] is None and parts > 1 and size % parts == 0 and not used & set(axes):
                chosen[place] = axes
                used |= set(axes)
    return chosen


def _present(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in mesh.shape)


def _parts(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)
