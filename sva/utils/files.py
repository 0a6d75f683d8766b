"""Reading text whoever saved it; writing files so that a reader never sees half of one, a full disk being one line."""

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sva.utils.errors import UserError
from sva.utils.remote import is_remote, local_path, reaching, scratch, to_path, upload

if TYPE_CHECKING:
    import numpy as np


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary name beside `path` and renames: `path` is whole or untouched.

    A remote file is written here first, and sent as a whole.

    Raises:
      UserError: the disk is full or the place cannot be written to.
    """
    if is_remote(path):
        with scratch(path) as local:
            write_atomically(local, write)
            upload(local, path)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp's is 0600, and so is what safetensors writes
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


@contextmanager
def locked(path: Path, lock: Path, busy: str) -> Iterator[None]:
    """Holds `path` for this process through the file `lock`, whose directory is made.

    Raises:
      UserError: `busy`, where another process holds it; the place cannot be written to.
    """
    held = FileLock(lock, timeout=0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout as error:
        raise UserError(busy) from error
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield
    finally:
        held.release()


def locked_file(path: Path) -> AbstractContextManager[None]:
    """`locked` for the file at `path`, which a command's --out names."""
    busy = f"another process writes {path}; wait for it, or choose another --out"
    return locked(path, path.with_name(f".{path.name}.lock"), busy)


def new_directory(directory: str | Path) -> Path:
    """Its absolute path, which may be there, but empty; raises UserError where it holds something already."""
    directory = local_path(directory, "what is written").absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already holds something; give a new or an empty directory")
    return directory


def write_directory(directory: str | Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary directory beside `directory` and renames: `directory` is whole or not there.

    Raises:
      UserError: `directory` holds something already, the disk is full, or the place cannot be written to.
    """
    directory = new_directory(directory)
    try:
        temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            os.replace(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise disk_error(directory, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    """The one line for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(place).free
        return UserError(
            f"the disk is full: {path} could not be written ({free / 2**20:.0f} MiB free); free some space, or put "
            "runs (run_dir=...) and caches ($SVA_CACHE) elsewhere; what was finished before is kept"
        )
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def as_os_error(error: Exception, path: Path) -> OSError | None:
    """The operating system's error that a library's own tells of in its text (safetensors, tensorstore), or None."""
    number = re.search(r"os[ _]error(?:_code)?\W+(\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else None


def save_tensors(path: Path, tensors: Mapping[str, "np.ndarray"], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file (not atomically); what the library says of a full disk is an OSError again."""
    import numpy as np  # here, because settings are read without it
    import safetensors.numpy

    # The library writes an array's memory as it lies, so that one in another order would come back transposed.
    in_order = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(in_order, path, dict(metadata))
    except safetensors.SafetensorError as error:
        cause = as_os_error(error, path)
        if cause is None:
            raise
        raise cause from error


def decoded(content: bytes, where: Any) -> str:
    """The text of UTF-8 bytes, without a byte-order mark in front; line ends are "\n".

    Raises:
      UserError: they are not UTF-8; `where` names them in the message.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1}"
        raise UserError(f"{where} is not UTF-8 ({place}); save the file as UTF-8") from error
    return text.replace("\r\n", "\n")


def read_text(path: Path | str) -> str:
    """The text of a file, as `decoded` gives it.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    return decoded(_content(to_path(path)), path)


def read_lines(path: Path | str) -> list[str]:
    """The lines of a file; the last is what follows the last line end, "" where nothing does.

    A byte-order mark is left out at the start of every line, for files that were joined have one inside.

    Raises:
      UserError: it cannot be read, or a line (by its number) is not UTF-8.
    """
    lines = _content(to_path(path)).split(b"\n")
    return [decoded(line, f"{path}, line {place}").removesuffix("\r") for place, line in enumerate(lines, start=1)]


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file.

    Raises:
      UserError: it cannot be read, or is not a JSON dictionary.
    """
    content = _content(path)
    try:
        value = json.loads(decoded(content, "it"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON dictionary, not a {type(value).__name__}; fetch it again")
    return value


def _content(path: Path) -> bytes:
    try:
        with reaching(path):
            return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))
