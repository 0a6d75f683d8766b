"""Reading files of tensors that torch.save wrote, without torch and without running anything from the file.

Such a file is a zip: `data.pkl` says in pickle's language which tensors there are, `data/<key>` holds their numbers.
Pickle's REDUCE instruction calls any function by name, which is how a hostile file runs code. Here the standard
Unpickler resolves only the few names below, each to a plain value of our own (`_Unpickler`). What it would do without
bound is prevented before it sees the program (`_checked`): only instructions that torch writes for a dictionary of
tensors are let through, a memo index is no larger than the program, and every dictionary is a `_Names`, which takes
text as a key and hashes nothing else (hashing a tuple of itself sixty times over takes 2^60 steps).
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sva.utils.errors import UserError
from sva.utils.remote import local_path

_DTYPES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
}
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch before 1.6 began its files
# What zipfile raises for files that are not zip files, or of a kind that it does not unpack; then what the Unpickler
# and `_tensor` raise for a program that makes no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError),
    *(pickle.UnpicklingError, ValueError, KeyError, IndexError, OverflowError, TypeError, AttributeError),
)
# The instructions of pickle that torch writes for a dictionary of tensors. EMPTY_DICT stands for an OrderedDict.
_INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "NONE"),
    *("MARK", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
}
_MADE_DICT = b"ccollections\nOrderedDict\n)R"
_LONGEST_NAME = 80  # of a name out of the file that a message repeats


class SavedTensor(NamedTuple):
    """One tensor of a file: a read-only view of its numbers, and how it was saved."""

    array: np.ndarray  # in the stored dtype
    is_parameter: bool  # a torch.nn.Parameter
    requires_grad: bool


class _Name(NamedTuple):
    """A name that the file mentions; it stands for itself and is never resolved."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        return _call(self, arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it sets attributes of something other than a dictionary")


class _Names(dict[str, Any]):
    """A dictionary out of the file; its keys are text."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str):
            raise _Refused(f"a dictionary has {_kind(key)} as a key, not a name")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Passes over the attributes of a dictionary: what torch notes of a state_dict's modules, not needed."""


class _Storage(NamedTuple):
    values: np.ndarray


_STORAGES = {_Name("torch", name): dtype for name, dtype in _DTYPES.items()}
_NAMES = {
    _Name("collections", "OrderedDict"),
    _Name("torch._utils", "_rebuild_tensor_v2"),
    _Name("torch._utils", "_rebuild_parameter"),
    *_STORAGES,
}


def read_tensors(path: str | Path) -> dict[str, SavedTensor]:
    """The tensors of a file that `torch.save` made of a dictionary of tensors, such as a state_dict.

    Args:
      path: a `.pt` or `.pth` file, torch 1.6 or newer, of either byte order.
    Raises:
      UserError: no such file, not torch's format, truncated or damaged, or it holds anything but named tensors of
        floating-point numbers; nothing in it was run.
    """
    path = local_path(path, "a .pt file")
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(_LEGACY_MAGIC))
            if start == _LEGACY_MAGIC:
                raise UserError(
                    f"{path} is in torch's format from before 1.6, which is not read; with torch, load it with"
                    " weights_only=True and save it again"
                )
            if not start.startswith(b"PK"):
                raise UserError(
                    f"{path} is not a file that torch.save wrote; give a policy_params or learnable_params .pt"
                )
            with zipfile.ZipFile(stream) as archive:
                return _read(archive, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _Refused as error:
        raise UserError(f"{path} is refused, nothing in it was run: {error}") from error
    except UserError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is truncated or damaged ({reason}); fetch it again") from error


class _Refused(Exception):
    """The file holds something that a file of tensors never does."""


def _read(archive: zipfile.ZipFile, size: int) -> dict[str, SavedTensor]:
    entries = {info.filename: info for info in archive.infolist()}
    folder = next((name.partition("/")[0] for name in entries if name.endswith("/data.pkl")), None)
    if folder is None:
        raise _Refused("it is a zip file without data.pkl, not one that torch.save wrote")

    def read(name: str) -> bytes:
        entry = entries.get(f"{folder}/{name}")
        if entry is None:
            raise ValueError(f"{_short(name)} is missing")
        # torch never compresses; so no entry is larger than the file, whatever it says of itself
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _Refused(f"{_short(name)} is compressed or encrypted, which torch never does")
        if entry.file_size > size:
            raise ValueError(f"{_short(name)} is said to be longer than the file")
        return archive.read(entry)

    order = read("byteorder").decode("ascii") if f"{folder}/byteorder" in entries else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byte order {_short(order)}")
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        """The storage of a persistent id ("storage", type, key, device, count)."""
        match identity:
            case ("storage", _Name() as kind, str(key), str(), int(count)) if kind in _STORAGES:
                pass
            case _:
                raise _Refused("it refers to something outside itself that is not a storage of floating-point numbers")
        dtype = _STORAGES[kind]
        if key not in storages:
            data = read(f"data/{key}")
            words = np.frombuffer(data, f"{'<' if order == 'little' else '>'}u{dtype.itemsize}")
            storages[key] = _Storage(words.astype(f"<u{dtype.itemsize}", copy=False).view(dtype))
        values = storages[key].values
        if values.dtype != dtype or len(values) != count:
            raise ValueError(f"storage {_short(key)} holds {len(values)} {values.dtype} numbers, not {count} {dtype}")
        return storages[key]

    found = _Unpickler(_checked(read("data.pkl")), storage).load()
    if not isinstance(found, dict) or not found:
        raise _Refused(f"it holds {_kind(found)}, not a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(value, SavedTensor):
            raise _Refused(f"{_short(name)} is {_kind(value)}, not a tensor")
    return found


def _tensor(arguments: Any) -> SavedTensor:
    """A view into its storage, once offset, shape and strides are known to lie inside it."""
    match arguments:
        case (_Storage(values), int(offset), tuple(shape), tuple(strides), bool(grad), dict(), *_):
            pass
        case _:
            raise _Refused("a tensor is described in a way that torch never writes")
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor's shape, strides or offset are not sizes")
    count = 1
    for size in shape:
        count *= size
        if count > len(values):  # also of views that repeat numbers, which could stand for any amount of memory
            raise ValueError("a tensor is larger than its storage")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else offset
    if last >= len(values) + (count == 0):
        raise ValueError(f"a tensor ends at number {last} of a storage of {len(values)}")
    view = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [stride * values.itemsize for stride in strides], writeable=False
    )
    return SavedTensor(view, False, grad)


def _call(name: Any, arguments: Any) -> Any:
    """The plain value that a call of a known name stands for."""
    match name, arguments:
        case _Name("collections", "OrderedDict"), ():
            return _Names()
        case _Name("torch._utils", "_rebuild_tensor_v2"), _:
            return _tensor(arguments)
        case _Name("torch._utils", "_rebuild_parameter"), (SavedTensor() as tensor, bool(grad), dict()):
            return tensor._replace(is_parameter=True, requires_grad=grad)
    raise _Refused("it calls something in a way that torch never writes")


class _Unpickler(pickle.Unpickler):
    """The standard Unpickler, for which names and storages are values of this module."""

    def __init__(self, program: bytes, storage: Callable[[Any], _Storage]):
        super().__init__(io.BytesIO(program))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return _named(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        return self._storage(pid)


def _named(module: str, name: str) -> _Name:
    found = _Name(module, name)
    if found not in _NAMES:
        label = _short(f"{module}.{name}")
        raise _Refused(f"it asks for {label}, and a dictionary of floating-point tensors needs no such thing")
    return found


def _checked(program: bytes) -> bytes:
    """The program with a call of OrderedDict wherever it makes a dictionary.

    Raises:
      _Refused: an instruction or a name that no dictionary of tensors needs.
      ValueError: it does not end, or a memo index is larger than the program.
    """
    parts: list[bytes] = []
    name, start = "FRAME", 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in a name that is none of ours anyway
        for opcode, argument, place in pickletools.genops(io.BytesIO(program)):
            if opcode.name == "GLOBAL":
                _named(*str(argument).split(" ", 1))  # here too, for it says more than a later instruction
            if opcode.name not in _INSTRUCTIONS:
                raise _Refused(f"its pickle has the instruction {opcode.name}, which no dictionary of tensors needs")
            if opcode.name.endswith("BINPUT") and int(argument or 0) > len(program):
                raise ValueError(f"memo index {argument} in a program of {len(program)} bytes")
            parts.append(_kept(name, program[start:place]))
            name, start = opcode.name, place or 0
    return b"".join([*parts, b"."])


def _kept(instruction: str, code: bytes) -> bytes:
    """The code of an instruction as the Unpickler shall see it; frames would be of another length."""
    return {"FRAME": b"", "EMPTY_DICT": _MADE_DICT}.get(instruction, code)


def _kind(value: Any) -> str:
    """The kind of a value in words, for a message; the value itself may be endless and is not shown."""
    if isinstance(value, _Name):
        return f"the name {_short(f'{value.module}.{value.name}')}"
    if isinstance(value, SavedTensor):
        return "a single tensor"
    return {_Names: "a dictionary", str: "text", tuple: "a tuple", type(None): "nothing"}.get(
        type(value), "a plain value"
    )


def _short(text: str) -> str:
    """A name out of the file, printable and not too long."""
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
