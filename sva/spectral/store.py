"""Spectra of a whole model, decomposed once and kept on disk.

One safetensors file a matrix, under a directory of the base model's fingerprint. A matrix is what a kill may cost and
what a reader wants, so it is what a shard holds: written beside its place and renamed, it is there whole or not at
all. Its header is its line of the manifest (`Record`), so that no kill comes between a shard and what is said of it;
`manifest.json` gathers the headers after each run for whoever wants to see them, and nothing depends on it.

A file that is damaged, foreign or of another version is noticed, said in one line, and made again; a run that was
killed goes on after the last finished matrix.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from threadpoolctl import threadpool_limits

from sva.spectral.forms import Spectrum
from sva.spectral.svd import orthogonality_errors, reconstruction_error, svd, truncate
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_atomically, write_json
from sva.utils.progress import progress_bar
from sva.utils.remote import is_remote, local_file, reaching

FORMAT = "sva-spectrum-2"
MANIFEST = "manifest.json"

# A matrix whose short side is smaller is decomposed on one thread, beside others; a larger one gains by threads, and
# two of them at once might not fit into memory.
LARGE = 1024
THREADS_OF_LARGE = 8
# Seconds after which a temporary file is a killed run's; writing one takes a few.
STALE = 600.0
_HEADER = 1 << 20  # bytes at most of what a shard says of itself


class Source(NamedTuple):
    """A weight that is not in memory yet: its shape (D_out, D_in), and what reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of one stored spectrum: its line of the manifest.

    `rank` of `full_rank` components are stored. `relative_error` is the Frobenius norm of W - U diag(s) V^T over that
    of W, measured in float64, truncation included; `dropped` is the part of it that the dropped singular values
    make, sqrt(sum dropped^2) / norm(W), and `largest_dropped` the largest of them, which is the spectral norm of
    what is missing; both are 0 where nothing is. `u_error` and `v_error` are max abs(U^T U - I) and max abs(V^T V - I).
    """

    format: str
    fingerprint: str
    name: str
    weights: str  # dtype of the weights that were decomposed; the factors are float32
    asked_rank: int | None
    shape: tuple[int, ...]
    rank: int
    full_rank: int
    relative_error: float
    dropped: float
    largest_dropped: float
    u_error: float
    v_error: float
    sha256: str


def decompose(
    weights: Mapping[str, Source],
    fingerprint: str,
    directory: Path,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    progress: bool = True,
) -> dict[str, Spectrum]:
    """Spectra {name: Spectrum of float32 host arrays}, all in memory; arguments and errors as `stream`."""
    found = stream(weights, fingerprint, directory, dtype=dtype, rank=rank, progress=progress)
    spectra = {record.name: spectrum for record, spectrum in found}
    return {name: spectra[name] for name in weights}


def stream(
    weights: Mapping[str, Source],
    fingerprint: str,
    directory: Path,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Record, Spectrum]]:
    """Each matrix's record and spectrum (float32 host arrays): from `directory` where sound, else computed and kept.

    In no particular order. At most one matrix for each worker is in memory: matrices with a short side below LARGE
    are decomposed one a core, each on one BLAS thread, so that their bytes do not depend on the number of cores; larger
    ones by cores // THREADS_OF_LARGE workers (at least one) of as many threads.

    Args:
      weights: by name; read in a worker's thread.
      fingerprint: of the base model; files of another one are made again.
      directory: one file `<name>.safetensors` a matrix, and `manifest.json`.
      dtype: of the weights, for the record; files of another one are made again.
      rank: components to keep of each matrix; None for all. See `sva.spectral.svd.truncate` for what serves what.
      progress: show a bar on stderr while matrices are decomposed.
    Raises:
      UserError: rank below 1, a weight holds NaN or infinite values (named), or the disk is full.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank} must be at least 1, or left out for all components")
    wanted = {"format": FORMAT, "fingerprint": fingerprint, "weights": dtype, "asked_rank": rank}
    missing, refused = [], defaultdict(list)
    for name in weights:
        path = directory / f"{name}.safetensors"
        try:
            found = _read(path, wanted | {"name": name})
        except FileNotFoundError:
            missing.append(name)
        except ValueError as error:
            missing.append(name)
            refused[str(error)].append(path.name)
        else:
            yield found
    for reason, files in refused.items():
        which = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        print(f"sva: not used in {directory}: {which} ({reason}); decomposing again", file=sys.stderr)
    if not missing and (directory / MANIFEST).exists():
        return
    _sweep(directory)

    def make(name: str) -> tuple[Record, Spectrum]:
        return _make(weights[name], directory / f"{name}.safetensors", wanted | {"name": name}, rank)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with progress_bar("decompose", len(missing), "matrix", hidden=not (progress and missing)) as bar:
        for is_large, threads in ((True, min(cores, THREADS_OF_LARGE)), (False, 1)):
            names = [name for name in missing if (min(weights[name].shape) >= LARGE) == is_large]
            for found in _each(make, names, cores // threads, threads):
                bar.update()
                yield found
    write_manifest(directory)


def write_manifest(directory: Path) -> None:
    """Gathers the records of all files in `directory` into its manifest.json, atomically."""
    records = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:  # only its header: it may be far away, and large
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, _HEADER)))
            records.append(json.loads(header["__metadata__"]["sva"]))
        except (OSError, KeyError, TypeError, ValueError):
            continue  # not a file of this version; whoever needs it makes it again
    write_json(directory / MANIFEST, {"format": FORMAT, "spectra": records})


def _each(
    make: Callable[[str], tuple[Record, Spectrum]], names: list[str], workers: int, threads: int
) -> Iterator[tuple[Record, Spectrum]]:
    """What `make` gives for each name as it is ready; so many at once, each on so many BLAS threads."""
    if not names:
        return
    queue = iter(names)
    with threadpool_limits(threads, user_api="blas"), ThreadPoolExecutor(workers, "decompose") as pool:
        running: set[Future[tuple[Record, Spectrum]]] = {pool.submit(make, name) for name in islice(queue, workers)}
        try:
            while running:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                while ready:  # popped: not held while the next are made
                    yield ready.pop().result()
                running |= {pool.submit(make, name) for name in islice(queue, workers - len(running))}
        finally:
            for future in running:
                future.cancel()


def _make(source: Source, path: Path, wanted: Mapping[str, Any], rank: int | None) -> tuple[Record, Spectrum]:
    """Decomposes one weight and keeps it at `path`."""
    w = np.asarray(source.read(), np.float32)
    try:
        spectrum = svd(w)
    except UserError as error:
        raise UserError(f"{wanted['name']}: {error}") from error
    full_rank = len(spectrum.s)
    norm, dropped = float(np.linalg.norm(spectrum.s.astype(np.float64))), np.zeros(0)
    if rank is not None and rank < full_rank:
        spectrum, dropped = truncate(spectrum, rank)
    u_error, v_error = orthogonality_errors(spectrum)
    record = Record(
        **wanted,
        shape=w.shape,
        rank=len(spectrum.s),
        full_rank=full_rank,
        relative_error=reconstruction_error(w, spectrum),
        dropped=float(np.linalg.norm(dropped.astype(np.float64))) / norm if norm else 0.0,
        largest_dropped=float(dropped.max(initial=0.0)),
        u_error=u_error,
        v_error=v_error,
        sha256=_digest(spectrum),
    )
    header = {"format": FORMAT, "sva": json.dumps(dataclasses.asdict(record))}
    write_atomically(path, lambda p: save_tensors(p, spectrum._asdict(), header))
    return record, spectrum


def _digest(spectrum: Spectrum) -> str:
    digest = hashlib.sha256()
    for factor in spectrum:
        digest.update(f"{factor.dtype} {factor.shape}".encode())
        digest.update(np.ascontiguousarray(factor).data)
    return digest.hexdigest()


def _read(path: Path, wanted: Mapping[str, Any]) -> tuple[Record, Spectrum]:
    """The stored record and spectrum.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is one that cannot be trusted; the message says why.
    """
    with reaching(path):
        if not path.exists():
            raise FileNotFoundError(path)
    try:
        with local_file(path) as local, safetensors.safe_open(local, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
            record = Record(**json.loads(header["sva"]))
            for key, value in wanted.items():
                if getattr(record, key) != value:
                    raise ValueError(f"its {key} is {getattr(record, key)!r}, not {value!r}")
            spectrum = Spectrum(*(file.get_tensor(key) for key in Spectrum._fields))
    except (safetensors.SafetensorError, KeyError, TypeError, OSError) as error:
        raise ValueError(str(error)) from error
    if _digest(spectrum) != record.sha256:
        raise ValueError("its contents do not match their digest")
    return record, spectrum


def _sweep(directory: Path) -> None:
    """Removes temporary files that killed runs left behind; a remote directory gets none."""
    if is_remote(directory):
        return
    for path in directory.glob(".*.safetensors.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
