"""What is shared as a whole: an expert, a mixture with the experts that it mixes, or a checkpoint; and its folder.

    expert       expert.safetensors                                        README.md
    mixture      alphas.json  expert-1.safetensors  expert-2.safetensors   README.md
    checkpoint   config.json  *.safetensors  tokenizer and chat template   README.md

A folder is what a repository of the Hub holds: `write` makes one, `read` takes one back, and no byte of a file but the
card changes on the way. The experts of a mixture are numbered in the order of its alphas.
"""

import dataclasses
import fnmatch
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sva.adaptation.mixture_file import Alphas
from sva.models.hub import EXPERT_FILE, HUB_PATTERNS, MIXTURE_FILE
from sva.sharing import redact
from sva.spectral.expert import Expert
from sva.utils.errors import UserError
from sva.utils.files import read_json

CARD = "README.md"
PATTERNS = (*HUB_PATTERNS, "LICENSE*", "NOTICE*")
"""Files of a folder that travel; with the card."""

_KINDS = {"expert": "an expert", "mixture": "a mixture", "checkpoint": "a checkpoint"}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One thing to share, read and found sound."""

    kind: str  # expert, mixture or checkpoint
    files: Mapping[str, Path]  # name in the folder: where it lies; without the card
    card: Path | None = None  # one that lies beside them
    experts: tuple[Expert, ...] = ()  # the expert; those that a mixture mixes; the one merged into a checkpoint
    alphas: Alphas | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the run that made the expert: result.json
    left: tuple[str, ...] = ()  # files of the source that do not travel

    @property
    def words(self) -> str:
        """What it is."""
        return _KINDS[self.kind]

    def places(self) -> list[str]:
        """Paths that stand in the files themselves, in the records of experts and of a mixture."""
        known = [expert.metadata for expert in self.experts if self.kind != "checkpoint"]
        mixture = [self.alphas.base, self.alphas.record] if self.alphas else []
        return sorted(set(redact.places([*known, *mixture])))


def kind_of(names: Iterable[str]) -> str | None:
    """What a folder or repository with these files holds; None where it is none of the three."""
    names = set(names)
    if MIXTURE_FILE in names:
        return "mixture"
    if EXPERT_FILE in names:
        return "expert"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "checkpoint"
    return None


def travels(name: str) -> bool:
    """Whether a file of this name goes along: weights, settings, tokenizer, licence; nothing hidden, no code."""
    return not name.startswith(".") and any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def read(source: Path, experts: Sequence[Path] = ()) -> Bundle:
    """What lies at `source`.

    Args:
      source: an expert file, a mixture file, or a folder: one that `write` wrote, a run directory, a checkpoint.
      experts: files of the experts that a mixture mixes, in any order (of a folder, by default those in it); of the
        one expert that was merged into a checkpoint, for its card.
    Raises:
      UserError: nothing there, something else, a damaged file, or other experts than the mixture's.
    """
    if not source.exists():
        raise UserError(f"there is nothing at {source}; give an expert file, a mixture file or a folder")
    if not source.is_dir():
        return _mixture(source, experts) if source.suffix == ".json" else _expert(source, experts)
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    card = source / CARD if CARD in names else None
    kind = kind_of(names)
    if kind is None:
        raise UserError(
            f"{source} holds no expert ({EXPERT_FILE}), mixture ({MIXTURE_FILE}) or checkpoint (config.json and "
            f".safetensors): {_few(names)}"
        )
    if kind == "checkpoint":
        return _checkpoint(source, names, card, experts)
    if kind == "expert":
        return dataclasses.replace(_expert(source / EXPERT_FILE, experts), card=card)
    inside = [source / name for name in names if fnmatch.fnmatchcase(name, "expert-*.safetensors")]
    return dataclasses.replace(_mixture(source / MIXTURE_FILE, experts or inside), card=card)


def write(
    bundle: Bundle, folder: Path, card: str | None = None, *, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Puts the bundle's files, and the card, into a folder that is there and empty.

    Args:
      card: its text; None for the bundle's own.
      copy: takes (from, to); `os.symlink` where the folder is only read.
    """
    for name, path in bundle.files.items():
        copy(path.absolute(), folder / name)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    elif bundle.card is not None:
        shutil.copyfile(bundle.card, folder / CARD)


def _expert(path: Path, experts: Sequence[Path]) -> Bundle:
    if experts:
        raise UserError(f"{path} is an expert itself; --expert is for mixtures and checkpoints, leave it out")
    expert = Expert.load(path)
    return Bundle("expert", {EXPERT_FILE: path}, experts=(expert,), record=_record(path, expert))


def _record(path: Path, expert: Expert) -> Mapping[str, Any]:
    """The result.json beside an expert, if it is of the run that made this one."""
    beside = path.with_name("result.json")
    if not beside.is_file():
        return {}
    found = read_json(beside)
    is_same = all(found.get(name) == expert.metadata.get(name) for name in ("config", "fingerprint"))
    return found if is_same and "config" in found else {}


def _mixture(path: Path, experts: Sequence[Path]) -> Bundle:
    alphas = Alphas.load(path)
    lies = {}
    for file in experts:
        expert = Expert.load(file)
        lies[expert.digest] = (file, expert)
    ordered = alphas.ordered([expert for _, expert in lies.values()])  # raises: one is missing, or too many
    files = {f"expert-{number}.safetensors": lies[one.digest][0] for number, one in enumerate(ordered, 1)}
    return Bundle("mixture", {MIXTURE_FILE: path} | files, experts=tuple(ordered), alphas=alphas)


def _checkpoint(source: Path, names: Sequence[str], card: Path | None, experts: Sequence[Path]) -> Bundle:
    if len(experts) > 1:
        raise UserError(f"{len(experts)} experts are given with --expert; a checkpoint has one merged into it")
    read_json(source / "config.json")
    if "model.safetensors.index.json" in names:
        index = read_json(source / "model.safetensors.index.json").get("weight_map") or {}
        if missing := sorted(set(index.values()) - set(names)):
            raise UserError(f"{source} lacks {missing[0]}, which its index names; export the checkpoint again")
    going = [name for name in names if travels(name)]
    left = tuple(name for name in names if name not in (*going, CARD))
    folders = tuple(f"{path.name}/" for path in sorted(source.iterdir()) if path.is_dir())
    merged = [Expert.load(path) for path in experts]
    record = _record(experts[0], merged[0]) if merged else {}
    files = {name: source / name for name in going}
    return Bundle("checkpoint", files, card, tuple(merged), record=record, left=left + folders)


def dtypes(bundle: Bundle) -> list[str]:
    """A checkpoint's dtype, as its config.json says it; empty where it does not."""
    config = read_json(bundle.files["config.json"])
    return [str(config[name]) for name in ("dtype", "torch_dtype") if config.get(name)][:1]


def _few(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + rest) if names else "there is no file in it"
