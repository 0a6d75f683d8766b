"""The file of one evaluation: a header with its settings, then one line of JSON an example, appended as it is made.

    {"settings": {...}, "made_with": {...}}
    {"index": 0, "prompt": ..., "completion": ..., "answer": ..., "correct": ..., "reason": ..., "tokens": ..., ...}

Killed at any moment, it is gone on with: a last line that was cut off is dropped, and nothing else.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sva.utils.errors import UserError, differing
from sva.utils.files import decoded, disk_error, locked_file


class RecordFile:
    """An evaluation's file, open to append to; made by `opened`."""

    def __init__(self, path: Path, rows: dict[int, dict[str, Any]]) -> None:
        self.path, self.rows = path, rows
        self._file = path.open("a")

    def append(self, index: int, row: Mapping[str, Any]) -> None:
        """Writes one row, at once.

        Raises:
          UserError: the disk is full.
        """
        line = json.dumps({"index": index, **row})
        self.rows[index] = json.loads(line)
        try:
            self._file.write(f"{line}\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self) -> None:
        """Ends writing."""
        self._file.close()


@contextmanager
def opened(path: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> Iterator[RecordFile]:
    """The file at `path`, new or with the rows that an earlier run of the same settings left there.

    Args:
      settings: what makes two evaluations the same; in full in the header.
      made_with: versions and command, for the reader; may differ between runs.
    Raises:
      UserError: the file is of other settings (named) or no such file, another process writes it, or the disk is full.
    """
    with locked_file(path):
        try:
            rows = _kept(path, json.loads(json.dumps(settings)))
            if rows is None:
                path.write_text(json.dumps({"settings": settings, "made_with": made_with}) + "\n")
            file = RecordFile(path, rows or {})
            try:
                yield file
            finally:
                file.close()
        except OSError as error:
            raise disk_error(path, error) from error


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]] | None:
    """The rows of an earlier run, its cut-off last line removed; None where there is no header yet."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        return None
    theirs, rows = read(path)
    if others := differing(theirs, settings):
        raise UserError(f"{path} holds another evaluation ({others}); choose another --out or delete it")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """(settings, {index: row}) of an evaluation's file; a last line that was cut off is left out.

    Raises:
      UserError: no such file, or one that is no evaluation's; a broken line, by its number.
    """
    if not path.is_file():
        raise UserError(f"no records at {path}; sva evaluate TASK --out {path} makes them")
    lines = path.read_bytes().split(b"\n")[:-1]
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(decoded(line, "it")))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); delete the file and run again") from error
    header, *rows = parsed or [None]
    if not isinstance(header, dict) or "settings" not in header or not all("index" in row for row in rows):
        raise UserError(f"{path} is not the records of an evaluation; its first line has no settings")
    return header["settings"], {row["index"]: row for row in rows}
