"""Bundles to the Hugging Face Hub and back."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors as hub_errors

from sva.models.hub import EXPERT_FILE, Gated, asking, is_hub_id
from sva.models.packaged import Unreachable
from sva.sharing import bundle as bundles
from sva.sharing.bundle import CARD, PATTERNS, Bundle
from sva.utils.errors import UserError

_SECONDS = 10.0  # that the Hub may take to answer, for who names it asks for it
_NOT_OURS = (".gitattributes", CARD)  # files that are in every repository


class Repo(NamedTuple):
    """A repository, and one of its revisions (a branch, a tag, a commit); None for the newest."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def repo_of(text: str) -> Repo | None:
    """The repository of OWNER/NAME or OWNER/NAME@REVISION; None for any other text, as a path."""
    name, at, revision = text.partition("@")
    is_file = name.endswith((".safetensors", ".json", ".pt"))
    return Repo(name, revision or None) if is_hub_id(name) and not is_file and bool(at) == bool(revision) else None


def push(bundle: Bundle, repo: str, card: str | None, *, private: bool = False) -> str:
    """The address of the repository, which holds the bundle and nothing else now.

    Args:
      repo: owner/name; made where it is not there.
      card: README.md's text; None for the bundle's own.
      private: nobody else may read it; one that is there must be private already.
    Raises:
      UserError: no token, no network, a repository of somebody else's, or one that holds another kind of thing.
    """
    if not huggingface_hub.get_token():
        raise UserError("there is no token for the Hub: run 'hf auth login', or set HF_TOKEN to one that may write")
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="sva-") as place, _reaching(f"{repo}: "):
        folder = Path(place)
        bundles.write(bundle, folder, card, copy=os.symlink)  # the Hub's library reads through links
        _require_ours(api, repo, bundle, private)
        with _writing(repo):
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{bundle.words.capitalize()}, by sva expert push",
                delete_patterns=list(PATTERNS),  # files of an earlier one that this has not
            )
    return str(address)


def fetch(repo: Repo) -> Path:
    """The folder, in the Hugging Face cache, of what a repository holds; only what is missing is downloaded.

    Raises:
      UserError: no such repository or revision, nothing of sva's in it, or the Hub cannot be reached.
    """
    with _reaching(f"{repo}: there is nothing of that name here, and "):
        try:
            info = huggingface_hub.HfApi().model_info(repo.name, revision=repo.revision, timeout=_SECONDS)
            names = _names(info)
            if bundles.kind_of(names) is None:
                raise UserError(
                    f"{repo} holds no expert, mixture or checkpoint of sva ({', '.join(names) or 'no file'}); "
                    "give a repository that 'sva expert push' wrote"
                )
            return Path(
                huggingface_hub.snapshot_download(
                    repo.name, revision=info.sha or repo.revision, allow_patterns=[*PATTERNS, CARD]
                )
            )
        except hub_errors.RepositoryNotFoundError as error:
            raise UserError(
                f"{repo}: there is nothing of that name here, and the Hub has no such repository, or it is private "
                "(then run 'hf auth login' or set HF_TOKEN)"
            ) from error


def expert_file(repo: Repo) -> Path:
    """The file of an expert on the Hub, in the Hugging Face cache: as it lies there, or fetched.

    Raises:
      UserError: as `fetch`; what is there is no expert.
    """
    cached = huggingface_hub.try_to_load_from_cache(repo.name, EXPERT_FILE, revision=repo.revision)
    if isinstance(cached, str):
        return Path(cached)
    folder = fetch(repo)
    kind = bundles.kind_of(path.name for path in folder.iterdir())
    if kind != "expert":
        raise UserError(f"{repo} holds a {kind}, not an expert; fetch it with 'sva expert pull {repo}'")
    return folder / EXPERT_FILE


def _require_ours(api: huggingface_hub.HfApi, repo: str, bundle: Bundle, private: bool) -> None:
    """Raises UserError for a repository that holds something else, or is public where it should not be."""
    try:
        info = api.model_info(repo, timeout=_SECONDS)
    except hub_errors.RepositoryNotFoundError:
        return
    names = [name for name in _names(info) if name not in _NOT_OURS]
    kind = bundles.kind_of(names)
    if names and kind != bundle.kind:
        raise UserError(
            f"{repo} is there already and holds {f'a {kind}' if kind else ', '.join(names[:5])}, not "
            f"{bundle.words}; give another name"
        )
    if private and not info.private:
        raise UserError(f"{repo} is there already and public; leave out --private, or make it private on its page")


def _names(info: Any) -> list[str]:
    return sorted(sibling.rfilename for sibling in info.siblings or ())


@contextlib.contextmanager
def _reaching(told: str) -> Iterator[None]:
    """`asking`, with one that gives no answer a UserError too, which begins with the repository's name."""
    try:
        with asking(told.partition(":")[0].partition("@")[0]):
            yield
    except Gated as reason:
        raise UserError(str(reason)) from reason
    except Unreachable as reason:
        raise UserError(f"{told}{reason}; run again when there is a network") from reason


@contextlib.contextmanager
def _writing(repo: str) -> Iterator[None]:
    """Inside, what the Hub says of someone who may not write is one line, and what it says of the card."""
    try:
        yield
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and not isinstance(error, hub_errors.RepositoryNotFoundError):
            raise UserError("the Hub does not know the token: run 'hf auth login' again, or set HF_TOKEN") from error
        if status in (401, 403, 404):
            raise UserError(
                f"the Hub does not let you write to {repo}: it is someone else's, or your token may only read; give a "
                "name of your own, or a token that may write"
            ) from error
        if status == 400:
            raise UserError(f"the Hub refuses what would be sent to {repo}: {_said(error)}") from error
        raise
    except ValueError as error:  # its check of the YAML in front of the card
        raise UserError(f"the Hub refuses the card of {repo}: {_said(error)}; mend it in {CARD}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
