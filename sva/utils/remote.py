"""Places beyond this machine: gs://bucket/path and the like, where weights, spectra, experts and runs may lie.

They are reached through etils.epath, and so through fsspec and the package that it wants for the address: gcsfs (extra
`gcs`), s3fs or adlfs. An object there is written whole or not at all, but cannot be appended to, renamed or locked. A
file is therefore read by a copy, and a run works in a copy of its directory, a `Mirror`.
"""

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sva.utils.errors import TransientError, UserError

_NEEDS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
_MANIFEST, _OWNER = ".sva-files", ".sva-owner"
_AT_ONCE = 8  # files on their way


def to_path(name: "str | os.PathLike[str]") -> Path:
    """The path of a name: of this machine, or behind gs://, s3:// or az:// (an `epath.Path`, which has its methods)."""
    text = os.fspath(name)
    if not is_remote(text):
        return _at_home(text)
    scheme = text.partition("://")[0]
    if scheme not in _NEEDS:
        raise UserError(f"{text}: {scheme}:// is not reached; use a path or {', '.join(f'{s}://' for s in _NEEDS)}")
    from etils import epath  # a tenth of a second, which only addresses are worth

    return epath.Path(text)  # pyright: ignore[reportReturnType]


def _at_home(text: str) -> Path:
    """The path, `~` and `~user` in front being the home directory as in a shell: an unknown user's stays as it is."""
    found = Path(os.path.expanduser(text))
    if text.partition("/")[0] == "~" == found.parts[0]:
        raise UserError(f"{text}: there is no home directory; set $HOME, or write the whole path")
    return found


def local_path(name: "str | os.PathLike[str]", what: str) -> Path:
    """The path on this machine of a name, `~` in front being the home directory; `what` says in an error what it is.

    Raises:
      UserError: an address of another machine.
    """
    if is_remote(name):
        raise UserError(f"{os.fspath(name)}: {what} must be on this machine")
    return _at_home(os.fspath(name))


def is_remote(name: "str | os.PathLike[str]") -> bool:
    """Whether the name is an address of another machine's."""
    return "://" in os.fspath(name)


@contextlib.contextmanager
def reaching(name: "str | os.PathLike[str]", refused: type[Exception] = UserError) -> Iterator[None]:
    """Inside, what the packages behind an address raise is one line; that there is no such file passes through.

    Raises:
      UserError: the package for it is not installed.
      what `refused` says: it refuses.
    """
    if not is_remote(name):
        yield
        return
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except ImportError as error:
        package = _NEEDS.get(os.fspath(name).partition("://")[0], "its package")
        raise UserError(f"{os.fspath(name)}: {package} is not installed, which reaches it; pip install it") from error
    except Exception as error:  # theirs have no common class: credentials, retries, HTTP
        said = str(error).strip().partition("\n")[0]
        raise refused(f"{os.fspath(name)} cannot be reached ({type(error).__name__}: {said})") from error


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """The file itself, or while inside a copy of a remote one; as a missing local file, it need not be there."""
    if not is_remote(path):
        yield path
        return
    with scratch(path) as copy:
        with reaching(path), contextlib.suppress(FileNotFoundError):
            _copy(path, copy)
        yield copy


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A place of that name on this machine, with nothing in it; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sva-") as folder:
        yield Path(folder) / path.name


def upload(source: Path, target: Path) -> None:
    """Puts a local file at a remote path, over what is there."""
    with reaching(target):
        _copy(source, target)


@contextlib.contextmanager
def reading_directory(directory: Path) -> Iterator[Path]:
    """The directory itself, or while inside a copy of a remote one that a `Mirror` wrote."""
    if not is_remote(directory):
        yield directory
        return
    with scratch(directory) as copy:
        _fetch(directory, copy)
        yield copy


@contextlib.contextmanager
def local_directory(directory: Path) -> Iterator["Mirror | None"]:
    """Where to work on `directory`: in itself (None), or in a `Mirror` of a remote one, brought back at the end.

    Raises:
      UserError: what is raised inside, with the remote name in place of the copy's; a place that cannot be reached.
      TransientError: as `Mirror.push`.
    """
    if not is_remote(directory):
        yield None
        return
    with scratch(directory) as copy:
        mirror = Mirror(directory, copy)
        try:
            try:
                yield mirror
            finally:
                mirror.push()
                mirror.close()
        except UserError as error:
            raise UserError(str(error).replace(str(mirror.local), str(directory))) from error


class Mirror:
    """A copy of a remote directory; what changes in it is sent back.

    The remote directory is what its list of files says, which is written after them: a machine that is lost while it
    sends leaves the earlier state, or a file of steps that are not in the state yet. Whoever opens the directory last
    owns it: an earlier owner, as a machine that was thought lost, is told so when it sends next and writes no more.
    """

    def __init__(self, remote: Path, local: Path) -> None:
        """Fetches what is there."""
        self.remote, self.local = remote, local
        self._owner = uuid.uuid4().hex
        self._sending: Future[None] | None = None
        with reaching(remote):
            (remote / _OWNER).write_text(self._owner)
        _fetch(remote, local)
        self._sent = self._files()  # size and time of each file as it lies there
        self._pool = ThreadPoolExecutor(1, "mirror")

    def push(self) -> None:
        """Sends what changed since the last time, while the caller goes on; waits for the last time's end first.

        Raises what the last time ran into:
          TransientError: the place can no longer be reached.
          UserError: another process took the directory over.
        """
        self._wait()
        # What is there now: the files of this moment are those that belong together.
        self._sending = self._pool.submit(self._send, self._files())

    def close(self) -> None:
        """Waits until all is sent. Raises as `push`."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of each finished file, by its name below the directory."""
        found = {}
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not _is_temporary(name)]
            for name in names:
                path = Path(folder) / name
                if not _is_temporary(name):
                    with contextlib.suppress(FileNotFoundError):
                        about = path.stat()
                        found[path.relative_to(self.local).as_posix()] = (about.st_size, about.st_mtime_ns)
        return found

    def _send(self, files: dict[str, tuple[int, int]]) -> None:
        changed = [name for name, stamp in files.items() if self._sent.get(name) != stamp]
        gone = [name for name in self._sent if name not in files]
        if not changed and not gone:
            return
        with reaching(self.remote, TransientError):  # it was reached before
            if _read(self.remote / _OWNER) != self._owner:
                raise UserError(
                    f"another process has taken {self.remote} over; this one ends, and what it sent before is kept"
                )
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._put, changed))
            (self.remote / _MANIFEST).write_text("".join(f"{name}\n" for name in sorted(files)))
            for name in gone:
                with contextlib.suppress(FileNotFoundError):
                    (self.remote / name).unlink()
        self._sent = files

    def _put(self, name: str) -> None:
        _copy(self.local / name, self.remote / name)


def _fetch(remote: Path, local: Path) -> None:
    """Copies what the directory's list names."""

    def one(name: str) -> None:
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(remote / name, target)

    local.mkdir(parents=True, exist_ok=True)
    with reaching(remote):
        names = _read(remote / _MANIFEST).splitlines()
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(one, names))
        except FileNotFoundError as error:
            raise UserError(f"{remote} lacks files that its list {_MANIFEST} names: {error}; delete it") from error


def _copy(source: Path, target: Path) -> None:
    from etils import epath

    epath.Path(source).copy(target, overwrite=True)


def _read(path: Path) -> str:
    """A file's text; "" where there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _is_temporary(name: str) -> bool:
    """Locks, files that are being written, and orbax's directories before they are whole."""
    return name.startswith(".") or "orbax-checkpoint-tmp" in name


def name_of(directory: Path) -> str:
    """Hexadecimal, the same for one directory from anywhere."""
    where = str(directory) if is_remote(directory) else str(directory.resolve())
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def copy_small_files(directory: Path, target: Path, limit: int) -> None:
    """Copies the files of a remote directory (not below it) of at most `limit` bytes."""
    with reaching(directory):
        for path in directory.iterdir():
            about: Any = path.stat()
            if not about.is_directory and about.length <= limit:
                _copy(path, target / path.name)
