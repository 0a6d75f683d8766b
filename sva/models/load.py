"""A checkpoint's weights as the linen tree, streamed one at a time, and the fingerprint of what was read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sva.models import kept_weights, layout, moe_names
from sva.models.checkpoint import Checkpoint, match
from sva.models.fingerprint import digest, fingerprint
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.sharding import sharding
from sva.utils.progress import progress_bar


def load_params(
    checkpoint: Checkpoint,
    model: Transformer,
    *,
    mesh: Mesh | None = None,
    without: Collection[str] = (),
    matrix: Callable[[np.ndarray], Any] = jax.device_put,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """(params, fingerprint) of an open checkpoint; peak memory is one copy of the weights and one weight more.

    Weights come out in the model's dtype; layers are stacked as they are read where the model scans them. On a mesh
    each device is given its own part and nothing else. Of several processes, each reads of a weight the rows that its
    devices hold; whole it reads only its share of the weights, those that it digests for all. Weights in `without` are
    digested like the others and not kept.
    On one device each weight [D_out, D_in], or stack of them, becomes what `matrix` makes of it; `jax.device_put` takes
    over a memory map's pages without a copy. See `kept_weights` for what a second load of large files spares.

    Raises:
      UserError: a weight is missing, unexpected, given twice, of the wrong shape, or holds NaN or infinite values.
    """
    specs = expected(model.cfg)
    spelled = partial(moe_names.written, model.cfg.architecture)
    match({name: spec.shape for name, spec in specs.items()}, checkpoint.shapes, checkpoint.path, spelled)
    is_shared = mesh is not None and mesh.is_multi_process
    source = _Source(checkpoint, model.dtype, is_shared, progress)
    leaves: dict[Any, Any] = flatten_dict(layout.params(model))
    arrays: dict[tuple[str, ...], jax.Array] = {}
    with progress_bar("load", len(specs), "weight", leave=False, hidden=not progress) as bar:
        for path, names in layout.names_by_path(specs, model).items():
            if names[0] in without:
                if source.known is None and not is_shared:
                    for name in names:
                        source.read(name)
                bar.update(len(names))
                continue
            leaf, lead = leaves[path], layout.lead(model, path)
            if mesh is None:
                convert = matrix if len(specs[names[0]].shape) == 2 else jnp.asarray
                arrays[path] = convert(_whole(names, leaf.shape, lead, model.dtype, source.read))
            elif not is_shared:
                whole = _whole(names, leaf.shape, lead, model.dtype, source.read)
                arrays[path] = jax.device_put(whole, sharding(leaf, mesh))
            else:
                part = partial(_part, names, lead, source.part)
                arrays[path] = jax.make_array_from_callback(leaf.shape, sharding(leaf, mesh), part)
            bar.update(len(names))
    return unflatten_dict(arrays), source.fingerprint(list(specs))


class _Source:
    """Weights in the model's dtype, and their fingerprint: kept by an earlier load, or made of what is read.

    Of several processes (`is_shared`) nothing is kept.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: Any, is_shared: bool, progress: bool) -> None:
        self._kept = None if is_shared else kept_weights.entry(checkpoint)
        if self._kept is not None:
            checkpoint = kept_weights.unpacked(checkpoint, self._kept, progress=progress)
        self._checkpoint, self._dtype, self._is_shared = checkpoint, dtype, is_shared
        self._digests: dict[str, str] = {}
        self.known = self._kept.fingerprint() if self._kept else None  # of weights that were found to be finite

    def read(self, name: str) -> np.ndarray:
        """A weight; raises UserError where it holds NaN or infinite values."""
        if self.known is not None:
            return self._checkpoint.read(name).astype(self._dtype, copy=False)
        stored = self._checkpoint.read_finite(name)
        self._digests[name] = digest(stored)
        return stored.astype(self._dtype, copy=False)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """weight[index] of a weight."""
        return self._checkpoint.part(name, index).astype(self._dtype, copy=False)

    def fingerprint(self, names: Sequence[str]) -> str:
        """The fingerprint of these weights, which all have been read, or on several processes are read now."""
        if self.known is not None:
            return self.known
        digests = _digest_together(names, self.read, self._digests) if self._is_shared else self._digests
        known = fingerprint(digests.items())
        if self._kept is not None:
            self._kept.keep(known)
        return known


def _whole(
    names: Sequence[str], shape: tuple[int, ...], lead: tuple[int, ...], dtype: Any, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    """The weight, or the stack of the weights whose first axes are `lead`, of this shape."""
    if not lead:
        return read(names[0])
    stack = np.empty(shape, dtype)
    for at, name in zip(np.ndindex(lead), names, strict=True):
        stack[at] = read(name)
    return stack


def _part(
    names: Sequence[str],
    lead: tuple[int, ...],
    read_part: Callable[[str, tuple[slice, ...]], np.ndarray],
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """One device's part of the weight, or of the stack of the weights."""
    assert index is not None  # it is one only of arrays without a shape
    if not lead:
        return read_part(names[0], index)
    chosen, inside = np.asarray(names).reshape(lead)[index[: len(lead)]], index[len(lead) :]
    parts = np.stack([read_part(str(name), inside) for name in chosen.flat])
    return parts.reshape(*chosen.shape, *parts.shape[1:])


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
