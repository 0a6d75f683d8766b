"""Texts of a record without what is the machine's or its user's own: places of files, and secrets.

A record has the command that was typed, and so perhaps a home directory, a bucket or a token. A card is read by
everyone, and is made public here as a whole.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# A path that starts at a root, a home, a parent directory, a drive or a bucket; web addresses stay.
_PLACE = re.compile(
    r"""(?<![^\s"'`=,;:(\[{|])(?!https?://)(?:[A-Za-z][A-Za-z0-9+.-]*://|~|\.\.?[/\\]|[A-Za-z]:[\\/]|/(?!/))[^\s"'`,;)\]}|]*"""
)
_USER = re.compile(r"(?<=://)[^/\s@]+@")  # name and password of a web address
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}\b")


def public(text: str) -> str:
    """The text with every path cut down to its last name, and with tokens and passwords struck out.

    `configs/a.yaml` stays, `/home/me/a.yaml` and `gs://bucket/a.yaml` become `a.yaml`. Directories that hold spaces are
    found where they are this process's home or working directory, or below one.
    """
    for place in sorted({str(Path.cwd()), str(Path.home())}, key=len, reverse=True):
        if len(place) > 1:
            text = re.sub(rf"(?<![\w.\-/]){re.escape(place)}/", "./", text)
    text = _TOKEN.sub("...", _USER.sub("", text))
    return _PLACE.sub(lambda found: _last(found[0]), text)


def places(value: Any) -> Iterator[str]:
    """Every path in a JSON value's texts that `public` would cut."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from places(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from places(item)
    elif isinstance(value, str):
        yield from (place for place in _PLACE.findall(value) if _last(place) != place)


def _last(place: str) -> str:
    """The last name of a path; the text itself where there is none, as in "/" or "~"."""
    names = [name for name in re.split(r"[/\\]+", place) if name]
    return names[-1] if names and re.search(r"[/\\]", place) else place
