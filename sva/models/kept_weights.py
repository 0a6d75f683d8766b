"""What is kept of a large checkpoint, so that the next process reads it faster: fingerprint and unpacked weights.

    <cache>/checkpoints/<key>/source.json          the checkpoint's files, a hash of its weights' names, its fingerprint
                              weights.safetensors  of a packed checkpoint: its weights in float32, mapped into memory

The key is a hash of the files' paths, sizes, modification times and inodes: a file that is written again has another
one. Entries whose files are gone or changed are removed when the next one is made. Of SmolLM2-135M in Q4_1, unpacking
and hashing takes seven times as long as importing JAX, mapping what was kept a seventh of it.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sva.models.checkpoint import Checkpoint
from sva.models.fingerprint import digest, fingerprint
from sva.utils.errors import UserError
from sva.utils.files import read_json, write_atomically, write_json
from sva.utils.paths import cache_dir
from sva.utils.progress import progress_bar

LEAST = 16 << 20  # bytes of a checkpoint's files: smaller ones are read as fast as what would be kept
MOST = 2 << 30  # bytes of unpacked weights
_ALIGNED = 64  # bytes: what JAX takes over from a map without a copy


class Entry(NamedTuple):
    """The place of what is kept of a checkpoint."""

    directory: Path
    files: list[list[Any]]  # [path, size, modification time in ns, inode] of each
    names: str  # a hash of the weights' names: config.json, which is none of the files, decides which these are

    @property
    def weights(self) -> Path:
        """The unpacked weights."""
        return self.directory / "weights.safetensors"

    def source(self) -> dict[str, Any]:
        """What source.json says; empty where nothing is kept, or something else."""
        found = _read_source(self.directory)
        return found if (found.get("files"), found.get("names")) == (self.files, self.names) else {}

    def fingerprint(self) -> str | None:
        """The fingerprint of the weights, which were found to be finite; None where it is not kept."""
        return self.source().get("fingerprint")

    def keep(self, fingerprint: str, **more: Any) -> None:
        """Keeps the fingerprint; where the disk cannot take it, the next process makes it again."""
        with contextlib.suppress(UserError):
            source = {"files": self.files, "names": self.names, "fingerprint": fingerprint}
            write_json(self.directory / "source.json", source | more)
            _sweep(self.directory)


def entry(checkpoint: Checkpoint) -> Entry | None:
    """The place for what is kept of a checkpoint; None for a small one, or one behind an address."""
    files = _files(checkpoint.files)
    if sum(size for _, size, _, _ in files) < LEAST:
        return None
    return Entry(cache_dir() / "checkpoints" / _hash(files), files, _hash(sorted(checkpoint.shapes)))


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def unpacked(checkpoint: Checkpoint, kept: Entry, *, progress: bool = True) -> Checkpoint:
    """The checkpoint with its weights unpacked and kept, as read-only arrays in a memory map.

    The map's pages are the file's own: processes share them, and they are no copy in memory. A checkpoint that is not
    packed, too large, or finds no room on the disk stays as it is.

    Raises:
      UserError: a weight holds NaN or infinite values.
    """
    if checkpoint.quantisation is None or 4 * sum(map(math.prod, checkpoint.shapes.values())) > MOST:
        return checkpoint
    found = _mapped(checkpoint, kept)
    if found is None and _unpack(checkpoint, kept, progress):
        found = _mapped(checkpoint, kept)
    return found or checkpoint


def _mapped(checkpoint: Checkpoint, kept: Entry) -> Checkpoint | None:
    """The checkpoint on the kept weights; None where there are none, or where they are damaged."""
    wanted = kept.source().get("sum")
    header, places = _layout(checkpoint.shapes)
    try:
        data = np.memmap(kept.weights, np.uint8, "r")
    except (OSError, ValueError):  # not there, empty
        return None
    size = max(place.stop for place in places.values())
    if len(data) != size or data[: len(header)].tobytes() != header or _sum(data) != wanted:
        return None

    def read(name: str) -> np.ndarray:
        return np.asarray(data[places[name]]).view(np.float32).reshape(checkpoint.shapes[name])

    return dataclasses.replace(checkpoint, read=read)


def _unpack(checkpoint: Checkpoint, kept: Entry, progress: bool) -> bool:
    """Whether the weights could be unpacked to where they are kept."""
    header, places = _layout(checkpoint.shapes)
    digests: dict[str, str] = {}

    def write(path: Path) -> None:
        with (
            path.open("wb") as file,
            progress_bar("unpack", len(places), "weight", leave=False, hidden=not progress) as bar,
        ):
            file.write(header)
            for name in places:
                weight = np.ascontiguousarray(checkpoint.read_finite(name), np.float32)
                digests[name] = digest(weight)
                file.write(weight.data)
                bar.update()

    if shutil.disk_usage(_existing(kept.directory)).free < 2 * max(place.stop for place in places.values()):
        return False
    try:
        write_atomically(kept.weights, write)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            return False
        raise
    kept.keep(fingerprint(digests.items()), sum=_sum(np.memmap(kept.weights, np.uint8, "r")))
    return True


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, slice]]:
    """(the file's header, the bytes of each weight in the file) of float32 weights in safetensors' format."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    header = len(text).to_bytes(8, "little") + text
    places = (slice(*(len(header) + at for at in each["data_offsets"])) for each in entries.values())
    return header, dict(zip(entries, places, strict=True))


def _sum(data: np.ndarray) -> int:
    """A sum over a file's words of 8 bytes, modulo 2^64: tells a damaged file at the speed of memory."""
    whole = len(data) // 8 * 8
    return int(data[:whole].view(np.uint64).sum()) + int(data[whole:].sum())


def _files(paths: Sequence[Path]) -> list[list[Any]]:
    """[path, size, modification time in ns, inode] of each file; none where one cannot be reached."""
    try:
        stats = [(path.resolve(), path.stat()) for path in paths]
    except OSError:
        return []
    return [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats]


def _sweep(new: Path) -> None:
    """Removes the entries beside `new` whose checkpoint is gone or changed."""
    for path in new.parent.iterdir():
        files = _read_source(path).get("files", [])
        if path != new and files != _files([Path(name) for name, *_ in files]):
            shutil.rmtree(path, ignore_errors=True)


def _read_source(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / "source.json")
    except UserError:
        return {}


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
