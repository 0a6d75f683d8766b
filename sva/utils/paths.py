"""Where sva keeps what it can make or fetch again, and where it looks for data that is not committed."""

import os
from pathlib import Path

from sva.utils.errors import UserError
from sva.utils.remote import local_path, to_path

_REPOSITORY = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """$SVA_CACHE, else $XDG_CACHE_HOME/sva, else ~/.cache/sva: holds models, spectra, compiled functions.

    Read from the environment at each call; may not exist yet.
    """
    if own := os.environ.get("SVA_CACHE"):
        return local_path(own, "$SVA_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return local_path(base, "$XDG_CACHE_HOME") / "sva"
    return Path.home() / ".cache" / "sva"


def spectra_dir() -> Path:
    """$SVA_SPECTRA, which may be an address such as gs://bucket/spectra that many hosts share; else in the cache."""
    own = os.environ.get("SVA_SPECTRA")
    return to_path(own) if own else cache_dir() / "spectra"


def compiled_dir() -> str:
    """$SVA_COMPILED, which may be an address such as gs://bucket/compiled that outlives a pod; else in the cache."""
    own = os.environ.get("SVA_COMPILED")
    return str(to_path(own)) if own else str(cache_dir() / "compiled")


def data_dir() -> Path | None:
    """$SVA_DATA, else ../shared/data beside the checkout: holds the benchmarks; None where there is none.

    Raises:
      UserError: $SVA_DATA is set and is no folder.
    """
    own = os.environ.get("SVA_DATA")
    place = local_path(own, "$SVA_DATA") if own else _REPOSITORY.parent / "shared" / "data"
    if own and not place.is_dir():
        raise UserError(f"$SVA_DATA={own} is not a folder; set it to one that has the data, or unset it")
    return place if place.is_dir() else None
