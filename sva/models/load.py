"""A checkpoint's weights as the linen tree, streamed one at a time, and the fingerprint of what was read."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sva.models import layout
from sva.models.checkpoint import Checkpoint, match
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.sharding import sharding
from sva.utils.errors import UserError
from sva.utils.progress import progress_bar


def load_params(
    checkpoint: Checkpoint,
    model: Transformer,
    *,
    mesh: Mesh | None = None,
    without: Collection[str] = (),
    matrix: Callable[[np.ndarray], Any] = jnp.asarray,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """(params, fingerprint) of an open checkpoint; peak memory is one copy of the weights and one weight more.

    Weights come out in the model's dtype; layers are stacked as they are read where the model scans them. On a mesh
    each device is given its own part and nothing else. Of several processes, each reads of a weight the rows that its
    devices hold; whole it reads only its share of the weights, those that it digests for all. Weights in `without` are
    digested like the others and not kept.
    On one device each weight [D_out, D_in], or stack of them, becomes what `matrix` makes of it.

    Raises:
      UserError: a weight is missing, unexpected, given twice, of the wrong shape, or holds NaN or infinite values.
    """
    specs = expected(model.cfg)
    match({name: spec.shape for name, spec in specs.items()}, checkpoint.shapes, checkpoint.path)
    digests: dict[str, str] = {}

    def read(name: str) -> np.ndarray:
        stored = checkpoint.read(name)
        digests[name] = digest(stored)
        if not np.isfinite(stored).all():
            raise UserError(f"{checkpoint.path}: {name} holds NaN or infinite values; fetch the checkpoint again")
        return stored.astype(model.dtype, copy=False)

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return checkpoint.part(name, index).astype(model.dtype, copy=False)

    leaves: dict[Any, Any] = flatten_dict(layout.params(model))
    arrays: dict[tuple[str, ...], jax.Array] = {}
    with progress_bar("load", len(specs), "weight", leave=False, hidden=not progress) as bar:
        for path, names in layout.names_by_path(specs, model).items():
            if names[0] in without:
                if mesh is None or not mesh.is_multi_process:
                    for name in names:
                        read(name)
                bar.update(len(names))
                continue
            leaf = leaves[path]
            is_stack = path[0] == "layers"
            if mesh is None:
                convert = matrix if len(specs[names[0]].shape) == 2 else jnp.asarray
                arrays[path] = convert(_whole(names, leaf.shape, is_stack, model.dtype, read))
            elif not mesh.is_multi_process:
                whole = _whole(names, leaf.shape, is_stack, model.dtype, read)
                arrays[path] = jax.device_put(whole, sharding(leaf, mesh))
            else:
                part = partial(_part, names, is_stack, read_part)
                arrays[path] = jax.make_array_from_callback(leaf.shape, sharding(leaf, mesh), part)
            bar.update(len(names))
    if mesh is not None and mesh.is_multi_process:
        digests = _digest_together(list(specs), read, digests)
    return unflatten_dict(arrays), fingerprint(digests.items())


def digest(weight: np.ndarray) -> str:
    """Hexadecimal sha256 of one weight's dtype, shape and bytes."""
    state = hashlib.sha256(f"{weight.dtype} {weight.shape}".encode())
    state.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return state.hexdigest()


def fingerprint(digests: Iterable[tuple[str, str]]) -> str:
    """Hexadecimal sha256 over (name, digest) of every weight, whatever their order and their files."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(digests)).encode()).hexdigest()


def _whole(
    names: Sequence[str], shape: tuple[int, ...], is_stack: bool, dtype: Any, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    """The weight, or the stack of the weights, of this shape."""
    if not is_stack:
        return read(names[0])
    stack = np.empty(shape, dtype)
    for layer, name in enumerate(names):
        stack[layer] = read(name)
    return stack


def _part(
    names: Sequence[str],
    is_stack: bool,
    read_part: Callable[[str, tuple[slice, ...]], np.ndarray],
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """One device's part of the weight, or of the stack of the weights."""
    assert index is not None  # it is one only of arrays without a shape
    if not is_stack:
        return read_part(names[0], index)
    return np.stack([read_part(name, index[1:]) for name in names[index[0]]])


def _digest_together(
    names: Sequence[str], read: Callable[[str], np.ndarray], digests: Mapping[str, str]
) -> dict[str, str]:
    """The digests of all weights, each made by one process; `read` leaves those of this one in `digests`."""
    table = np.zeros((len(names), 32), np.uint8)
    for place in range(jax.process_index(), len(names), jax.process_count()):
        read(names[place])
        table[place] = np.frombuffer(bytes.fromhex(digests[names[place]]), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(table)).sum(axis=0, dtype=np.uint8)
    return {name: bytes(row).hex() for name, row in zip(names, gathered, strict=True)}
