"""`sva expert push | pull`: experts, mixtures and checkpoints to the Hugging Face Hub and back."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from sva.cli.command_line import Command, argument, option
from sva.cli.options import start_jax
from sva.utils.errors import UserError
from sva.utils.files import write_atomically, write_directory
from sva.utils.remote import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Share an expert, a mixture or a merged checkpoint on the Hugging Face Hub, with a card made from its record.

    The files are sent as they are. The card says the base, the task, n, seed, interval, command and settings, as far as
    the record has them, and no path of this machine. A folder that has a README.md of its own keeps it.
    """

    source: Path = argument("an expert file, a mixture file of sva adapt, or a folder: a run's, a checkpoint's")
    repo: str = argument("OWNER/NAME on the Hub; made where it is not there")
    expert: tuple[Path, ...] = option(
        "an expert that the mixture mixes, sent along; or the one merged into the checkpoint, for its card; may be "
        "repeated",
        (),
    )
    licence: str | None = option("its licence as the Hub spells it, such as apache-2.0, for the card", None)
    base: str | None = option("its base model's hub id, for the card (default: the one the file names)", None)
    private: bool = option("a repository that nobody else reads", False)
    dry_run: bool = option("send nothing, write the folder that would be sent", False)
    out: Path | None = option("with --dry-run: that folder (default: NAME)", None, short="-o")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch what sva expert push shared: the same bytes. Of a mixture and a checkpoint this is a folder."""

    source: str = argument("OWNER/NAME or OWNER/NAME@REVISION on the Hub, or a folder that --dry-run wrote")
    out: Path | None = option("the file or folder to write (default: NAME.safetensors, or NAME)", None, short="-o")


def push(arguments: Push) -> None:
    """Runs `sva expert push`."""
    repo = _repo(arguments.repo)
    if arguments.out and not arguments.dry_run:
        raise UserError("--out is where --dry-run writes; give both, or neither")
    for name in ("base", "licence"):
        _check_word(name, getattr(arguments, name))
    start_jax()
    from sva.sharing import bundle as bundles
    from sva.sharing import card, hub

    bundle = bundles.read(arguments.source, arguments.expert)
    about = card.About(repo, arguments.licence and arguments.licence.lower(), arguments.base)
    if bundle.card and (arguments.licence or arguments.base):
        raise UserError(f"{bundle.card} is sent as it is; write --licence and --base into it, or remove it first")
    text = None if bundle.card else card.text(bundle, about)
    _tell(bundle)
    if arguments.dry_run:
        out = arguments.out or Path(repo.partition("/")[2])
        write_directory(out, lambda place: bundles.write(bundle, place, text))
        print(f"{out}: {_size(out)}; nothing was sent")
    else:
        print(f"{hub.push(bundle, repo, text, private=arguments.private)}: {bundle.words}")


def pull(arguments: Pull) -> None:
    """Runs `sva expert pull`."""
    start_jax()
    from sva.sharing import bundle as bundles
    from sva.sharing import hub

    local = local_path(arguments.source, "a folder") if "://" not in arguments.source else None
    repo = None if local and local.exists() else hub.repo_of(arguments.source)
    if repo is None and not (local and local.is_dir()):
        raise UserError(f"{arguments.source} is neither a folder nor OWNER/NAME, or OWNER/NAME@REVISION, on the Hub")
    name = repo.name.partition("/")[2] if repo else Path(arguments.source).absolute().name
    if arguments.out and arguments.out.exists():
        raise UserError(f"{arguments.out} exists; give another path with -o, or remove it first")
    bundle = bundles.read(hub.fetch(repo) if repo else Path(arguments.source).expanduser())
    out = arguments.out or Path(f"{name}.safetensors" if bundle.kind == "expert" else name)
    if out.exists():
        raise UserError(f"{out} exists; give another path with -o, or remove it first")
    if bundle.kind == "expert":
        (file,) = bundle.files.values()
        write_atomically(out, lambda path: shutil.copyfile(file, path))
    else:
        write_directory(out, lambda place: bundles.write(bundle, place))
    print(f"{out}: {bundle.words}{_described(bundle)}")


def _repo(text: str) -> str:
    from sva.models.hub import is_hub_id

    if not is_hub_id(text):
        raise UserError(f"{text!r} is not a name on the Hub; write OWNER/NAME, of letters, digits, '-', '_' and '.'")
    return text


def _check_word(name: str, value: str | None) -> None:
    """Raises UserError for a --base that is no hub id, a --licence that is no word."""
    from sva.models.hub import is_hub_id

    if value is not None and name == "base" and not is_hub_id(value):
        raise UserError(f"--base {value!r} is not a name on the Hub; write OWNER/NAME")
    if value is not None and name == "licence" and not value.replace("-", "").replace(".", "").isalnum():
        raise UserError(f"--licence {value!r} is not as the Hub spells one; write e.g. apache-2.0, mit or cc-by-4.0")


def _tell(bundle: Any) -> None:
    """Says what stays here, and which paths of this machine stand in the files themselves."""
    if bundle.left:
        print(f"sva: not sent: {', '.join(bundle.left)}", file=sys.stderr)
    if places := bundle.places():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        print(
            f"sva: the files are sent as they are, and their records name places of this machine: "
            f"{', '.join(places[:3])}{more}",
            file=sys.stderr,
        )


def _size(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes"


def _described(bundle: Any) -> str:
    """A few words about what was fetched."""
    if bundle.alphas is not None:
        return f" of {len(bundle.experts)} experts, for {bundle.alphas.base.get('name')}"
    return "".join(f", for {expert.metadata.get('base')}" for expert in bundle.experts)


PUSH = Command("push", Push, push)
PULL = Command("pull", Pull, pull)
