"""Spectra of a model's weights: computed once for each base model, kept under the cache directory, placed like them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from sva.generation.loaded_model import DTYPES, LoadedModel
from sva.models import layout, moe_names
from sva.models.checkpoint import Checkpoint, match
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.fingerprint import digest, fingerprint
from sva.models.hub import resolve
from sva.models.weights import by_name, expected, of_all_modules, path_of
from sva.parallel.sharding import Leaf, place, shardings
from sva.spectral import store
from sva.spectral.forms import Spectrum
from sva.spectral.store import Record
from sva.utils.errors import UserError
from sva.utils.matmul import Int8, floats
from sva.utils.paths import spectra_dir
from sva.utils.progress import progress_bar
from sva.utils.trees import adaptable, select


def decompose(
    lm: LoadedModel,
    targets: str = "mlp",
    *,
    layers: str | None = None,
    rank: int | None = None,
    progress: bool = True,
) -> Mapping[str, Spectrum]:
    """{weight name: Spectrum(u [D_out, R], s [R], vt [R, D_in])} of the target weights, s descending.

    u and vt have the model's dtype, s is float32. Computed once for each base model and kept under the cache
    directory (`sva.utils.paths.cache_dir`), where `sva decompose` puts them without loading the model.

    Args:
      lm: the base model.
      targets: see `sva.utils.trees.select`.
      layers: of these layers alone, e.g. "0-39" (`sva.utils.trees.layer_numbers`). Where layers are scanned, load the
        model with the same `layers`, so that an adapter can be on some of them.
      rank: components to keep, R = min(rank, D_out, D_in). A truncated spectrum serves the delta form, in which the
        dropped components keep z = 1, and `merge`; `factored` and `reinforce_loss` need all and refuse it.
      progress: show a bar on stderr.
    Raises:
      UserError: `targets` matches nothing, the model has no such layers, rank is below 1, or a weight holds NaN or
        infinite values.
    """
    names = select(expected(lm.model.cfg), targets, layers)
    return spectra_of(lm, names, progress=progress) if rank is None else _spectra(lm, names, rank, progress)


def decompose_checkpoint(
    name_or_path: str,
    targets: str = "mlp",
    dtype: str = "float32",
    *,
    layers: str | None = None,
    rank: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> tuple[Path, list[Record]]:
    """(the cache's directory, the record of each matrix): `decompose` from the disk, one matrix in memory a worker.

    Records are those of this share, in the checkpoint's order. The model is not loaded: its weights are read once for
    the fingerprint, one by one, and the targets once more.

    Args:
      name_or_path: as in `load`.
      targets, layers, rank: as in `decompose`.
      dtype: of the model that will use the spectra; the weights are rounded to it first, as loading does.
      share: (i, n): this process takes every n-th matrix from the i-th on, counted among those of like shape, so that
        n processes or hosts with one cache directory share the work evenly.
      progress: show a bar on stderr.
    Raises:
      UserError: as `load` and `decompose`; a share that does not exist.
    """
    index, count = share
    if not 0 <= index < count:
        raise UserError(
            f"share {index}/{count} does not exist; {count} processes take 0/{count} to {count - 1}/{count}"
        )
    checkpoint = open_checkpoint(resolve(name_or_path))
    specs = expected(checkpoint.config)
    spelled = partial(moe_names.written, checkpoint.config.architecture)
    match({name: spec.shape for name, spec in specs.items()}, checkpoint.shapes, checkpoint.path, spelled)
    names = select(specs, targets, layers)
    mine = sorted(names, key=lambda name: specs[name].shape)[index::count]
    with progress_bar("fingerprint", len(specs), "weight", leave=False, hidden=not progress) as bar:

        def digests() -> Iterator[tuple[str, str]]:
            for name in specs:
                yield name, digest(checkpoint.read(name))
                bar.update()

        known = fingerprint(digests())

    rounded = np.dtype(DTYPES[dtype])
    sources = {name: store.Source(specs[name].shape, partial(_read, checkpoint, name, rounded)) for name in mine}
    directory = _spectra_dir(known, dtype, rank)
    records = {
        record.name: record
        for record, _ in store.stream(sources, known, directory, dtype=dtype, rank=rank, progress=progress)
    }
    return directory, [records[name] for name in names if name in records]


def spectra_of(lm: LoadedModel, names: Sequence[str], *, progress: bool = True) -> Mapping[str, Spectrum]:
    """`decompose` for weights given by name; where layers are scanned, a view of their stacks (`ByName`).

    Of modules that are decomposed already a name may be that of all in a layer (`of_all_modules`).

    Raises:
      UserError: the model has no linear layer with a weight of such a name.
    """
    known = set(adaptable(expected(lm.model.cfg)))
    known |= {of_all_modules(name) for name in known if path_of(name, lm.model.scan_layers)[0] in lm.spectra}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{lm.name} has no linear layer {unknown[0]} to adapt; is the expert for another model?")
    is_stacked = layout.has_stacks(lm.model, names) and layout.is_whole(lm.model, names)
    keys = layout.names_by_path(names, lm.model) if is_stacked else {name: [name] for name in names}
    missing = [name for key, of_key in keys.items() if key not in lm.spectra for name in of_key]
    if missing:
        found = _spectra(lm, missing, None, progress)
        lm.spectra.update(flatten_dict(lm.model.nest(found)) if is_stacked else found)
    if not is_stacked:
        return {name: lm.spectra[name] for name in names}
    return by_name(unflatten_dict({path: lm.spectra[path] for path in keys}), names, scan=lm.model.scan_layers)


def _spectra(lm: LoadedModel, names: Sequence[str], rank: int | None, progress: bool) -> Mapping[str, Spectrum]:
    """Spectra in the model's dtype, out of the store, on the model's devices; one matrix at a time is on the host."""
    dtype = np.dtype(lm.model.dtype)
    is_shared = lm.mesh is not None and lm.mesh.is_multi_process
    weights = {} if is_shared else lm.stored_params()
    kept = "int8" if any(isinstance(weights.get(name), Int8) for name in names) else dtype.name
    directory = _spectra_dir(lm.fingerprint, kept, rank)
    settings: dict[str, Any] = {"dtype": dtype.name, "rank": rank, "progress": progress}
    if not weights.keys() >= set(names):
        # This process holds parts of the weights at most: it decomposes its share of them out of the checkpoint.
        checkpoint = open_checkpoint(resolve(lm.name))
        shapes = {name: spec.shape for name, spec in expected(lm.model.cfg).items()}
        sources = {name: store.Source(shapes[name], partial(_read, checkpoint, name, dtype)) for name in names}
        mine = {name: sources[name] for name in list(names)[jax.process_index() :: jax.process_count()]}
        for _ in store.stream(mine, lm.fingerprint, directory, **settings):
            pass
        if is_shared:
            multihost_utils.sync_global_devices("sva: spectra")
    else:
        sources = {
            name: store.Source(
                weights[name].shape, lambda name=name: np.asarray(floats(weights[name], jnp.float32), np.float32)
            )
            for name in names
        }
    leaves = expected(lm.model.cfg)
    placed = (
        (record.name, _on_devices(lm, leaves[record.name], Spectrum(u.astype(dtype), s, vt.astype(dtype))))
        for record, (u, s, vt) in store.stream(sources, lm.fingerprint, directory, **settings)
    )
    if not (layout.has_stacks(lm.model, names) and layout.is_whole(lm.model, names)):
        found = dict(placed)
        return {name: found[name] for name in names}
    stacks: dict[Any, Spectrum] = {}
    for name, spectrum in placed:
        path, at = path_of(name, lm.model.scan_layers)
        if not at:
            stacks[path] = spectrum
            continue
        if path not in stacks:
            stacks[path] = _empty_stack(lm, name, spectrum)
        stacks[path] = _put(stacks[path], tuple(map(np.int32, at)), spectrum)
    return by_name(unflatten_dict(stacks), names, scan=lm.model.scan_layers)


def _on_devices(lm: LoadedModel, weight: Leaf, spectrum: Spectrum) -> Spectrum:
    if lm.mesh is None:
        return jax.tree.map(jnp.asarray, spectrum)
    leaves = layout.spectrum(weight, len(spectrum.s))
    return place(spectrum, shardings(leaves, lm.mesh))


def _empty_stack(lm: LoadedModel, name: str, one: Spectrum) -> Spectrum:
    """Zeros for the stack of spectra that this weight's is one of, placed like them."""
    path, _ = path_of(name, lm.model.scan_layers)
    lead = layout.lead(lm.model, path)
    leaves = layout.in_stack(lm.model, path, layout.spectrum(expected(lm.model.cfg)[name], len(one.s)))
    placed = None if lm.mesh is None else shardings(leaves, lm.mesh)
    make = jax.jit(lambda: Spectrum(*(jnp.zeros((*lead, *x.shape), x.dtype) for x in one)), out_shardings=placed)
    return make()


@partial(jax.jit, donate_argnums=0)
def _put(stack: Spectrum, at: tuple[jax.Array, ...], one: Spectrum) -> Spectrum:
    """The stack with one weight's spectrum in its place; no second stack is made."""
    return jax.tree.map(lambda x, y: x.at[at].set(y), stack, one)


def _read(checkpoint: Checkpoint, name: str, dtype: np.dtype) -> np.ndarray:
    """A weight in float32, rounded first to the dtype that the model holds it in."""
    return checkpoint.read(name).astype(dtype, copy=False).astype(np.float32, copy=False)


def _spectra_dir(known: str, dtype: str, rank: int | None) -> Path:
    return spectra_dir() / f"{known[:16]}-{dtype}{'' if rank is None else f'-rank{rank}'}"
