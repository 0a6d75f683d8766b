"""The files of a GGUF model: header, metadata and packed tensors, unpacked one at a time; in one part or several.

The header is parsed here and the packed types by the `gguf` package: its own reader takes 2 s for the 49,152
tokens of SmolLM2 (an array object for each), this takes a tenth of a second, and every length is checked.
Format: the GGUF specification in ggml's documentation, versions 2 and 3.
"""

import functools
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sva.utils.errors import UserError
from sva.utils.remote import local_path

# Rows are unpacked in blocks of about this many numbers, so that a big matrix needs little beside its result.
_BLOCK = 1 << 21

_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d+)-of-(?P<of>\d+)\.gguf")

_STRING, _ARRAY = 8, 9
_SCALARS = {
    **dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])),
    **dict(enumerate(["<Q", "<q", "<d"], start=10)),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file; `shape` is (out, in), the reverse of the file's own order."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int  # in bytes from the start of the file
    file: Path

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return (self.shape[-1] if self.shape else 1) // block * size

    @property
    def num_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF model: tensors, and metadata (numbers, strings; lists of numbers as arrays).

    `path` is the file, or the first of the files that the model is split into, which alone holds the metadata.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.metadata:
            raise UserError(f"{self.path}: the metadata key {key} is missing; fetch another conversion of the model")
        return self.metadata[key]

    def read(self, name: str) -> np.ndarray:
        """A tensor unpacked to float32, in memory of its own."""
        tensor = self.tensors[name]
        out = np.empty((tensor.num_rows, tensor.shape[-1] if tensor.shape else 1), np.float32)
        step = max(1, _BLOCK // max(1, out.shape[1]))
        try:
            with open(tensor.file, "rb") as stream:
                stream.seek(tensor.offset)
                for start in range(0, len(out), step):
                    block = out[start : start + step]
                    raw = np.fromfile(stream, np.uint8, len(block) * tensor.row_bytes)
                    block[:] = gguf.quants.dequantize(raw.reshape(len(block), tensor.row_bytes), tensor.kind)
        except OSError as error:
            raise UserError(f"{tensor.file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{tensor.file} has become shorter while it was read; fetch it again") from error
        return out.reshape(tensor.shape)


def read_gguf(path: Path | str) -> GGUFFile:
    """The header of a GGUF file, or of all the files of a split model, whichever of them is given.

    Raises:
      UserError: not a GGUF file, a version or a packed type that is not supported, truncated or corrupt; parts that
        are missing (named) or do not belong together.
    """
    file = _read_one(local_path(path, "a GGUF file"))
    count = file.get("split.count", 1)
    return _joined(file, count) if isinstance(count, int) and count > 1 else file


def one_a_model(files: Iterable[Path]) -> list[Path]:
    """The files, but of those of a split model only the first."""
    models: dict[Any, Path] = {}
    for file in files:
        part = _PART.fullmatch(file.name)
        models.setdefault((part["stem"], part["of"]) if part else file, file)
    return list(models.values())


def _part(file: Path, part: re.Match[str], number: int) -> Path:
    """The path of another part of the split model that `file` is a part of."""
    return file.with_name(f"{part['stem']}-{number:0{len(part['no'])}d}-of-{part['of']}.gguf")


def _joined(given: GGUFFile, count: int) -> GGUFFile:
    """The whole of a split model of which one part is given."""
    part = _PART.fullmatch(given.path.name)
    if part is None or int(part["of"]) != count:
        raise UserError(
            f"{given.path} is one of the {count} files of a split model, which are found by their names; call it "
            f"NAME-0000N-of-{count:05d}.gguf again"
        )
    paths = [_part(given.path, part, number) for number in range(1, count + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{given.path} is one of the {count} files of a split model; not beside it: {some}; fetch them")
    parts = [given if path == given.path else _read_one(path) for path in paths]
    tensors: dict[str, GGUFTensor] = {}
    for number, file in enumerate(parts):
        said = file.get("split.no", number), file.get("split.count")
        if said != (number, count):
            raise UserError(
                f"{file.path} is part {said[0]} (from 0) of {said[1]}, not {number} of {count}; fetch it again"
            )
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise UserError(f"{name} is set twice, in {tensors[name].file} and in {file.path}; fetch them again")
            tensors[name] = tensor
    total = parts[0].get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(f"{paths[0]} and the other parts hold {len(tensors)} tensors, not {total}; fetch them again")
    return GGUFFile(paths[0], parts[0].metadata, tensors)


def _read_one(path: Path) -> GGUFFile:
    """The header of one file, every length in it checked against the file's size."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return _parsed(path, stat.st_size, (stat.st_mtime_ns, stat.st_ino))


@functools.lru_cache(1)  # the reader of the weights and then that of the tokenizer ask for the same file
def _parsed(path: Path, size: int, state: tuple[int, int]) -> GGUFFile:
    """`_read_one` of a file of this size, in this state."""
    del state
    try:
        with open(path, "rb") as stream:
            magic = stream.read(24)
            if magic[:4] != b"GGUF":
                hint = "it is a Git LFS pointer: run `git lfs pull`" if magic.startswith(b"version https") else ""
                raise UserError(f"{path} is not a GGUF file; {hint or 'fetch it again'}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).file()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is truncated or corrupt ({error}); fetch it again") from error


class _Parser:
    """Walks through a GGUF header; whatever does not fit raises ValueError or struct.error."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 4

    def file(self) -> GGUFFile:
        version = self.scalar("<I")
        if version not in (2, 3):
            swapped = " (big-endian)" if struct.unpack("<I", struct.pack(">I", version))[0] in (2, 3) else ""
            raise UserError(f"{self.path}: GGUF version {version}{swapped} is not supported, only 2 and 3")
        num_tensors, num_keys = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(num_tensors):
            name, tensor = self.tensor()
            if name in tensors:
                raise UserError(f"{name} is set twice in {self.path}; fetch it again")
            tensors[name] = tensor
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            end = tensor.offset + tensor.num_rows * tensor.row_bytes
            if end > self.size:
                raise ValueError(f"{name} should end at byte {end}, the file at {self.size}")
        return GGUFFile(self.path, metadata, tensors)

    def take(self, count: int) -> int:
        """Steps over `count` bytes that must be there; gives their start."""
        start = self.at
        if count > self.size - start:
            raise ValueError(f"the header needs {count} bytes at {start}, the file ends at {self.size}")
        self.at = start + count
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner in (_STRING, _ARRAY):
                self.take(8 * count)  # each has at least its length; then go back and read
                self.at -= 8 * count
                return [self.value(inner) for _ in range(count)]
            dtype = np.dtype(self.form(inner))
            start = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[start : self.at], dtype)
        return self.scalar(self.form(kind))

    def form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def tensor(self) -> tuple[str, GGUFTensor]:
        name = self.string()
        num_axes = self.scalar("<I")
        if num_axes > 4:
            raise ValueError(f"{name} has {num_axes} axes")
        shape = tuple(self.scalar("<Q") for _ in range(num_axes))[::-1]
        number = self.scalar("<I")
        kind = next((k for k in gguf.GGMLQuantizationType if k == number), None)
        if kind is None or not _can_unpack(kind):
            raise UserError(f"{self.path}: {name} is packed as {kind.name if kind else number}, which is not supported")
        if shape and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"rows of {name} have {shape[-1]} numbers, which {kind.name} cannot pack")
        if any(axis > self.size * 8 for axis in shape):
            raise ValueError(f"{name} has shape {list(shape)}")
        return name, GGUFTensor(shape, kind, self.scalar("<Q"), self.path)


@functools.cache
def _can_unpack(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
