"""JSONL files: prompts to read, and results that a run which starts again resumes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sva.utils.errors import UserError, differing
from sva.utils.files import decoded, disk_error, locked_file

_HEADER = b'{"settings": '  # how a file of results begins


class Prompt(NamedTuple):
    """One prompt of a file."""

    line: int  # counted from 1
    text: str


def read_prompts(source: BinaryIO, name: str, *, jsonl: bool) -> tuple[list[Prompt], list[str]]:
    """(prompts, one sentence a line that is not one), in the file's order.

    Args:
      source: lines of UTF-8: a prompt each, or where `jsonl` is set an object with the string "prompt" each. Empty
        lines are passed over.
      name: of the file, for the sentences.
    """
    prompts, faults = [], []
    for number, raw in enumerate(source, 1):
        try:
            line = decoded(raw, f"{name} line {number}").strip("\r\n")
            if not line.strip():
                continue
            prompt = _prompt(line) if jsonl else line
        except UserError as error:
            faults.append(str(error))
        except ValueError as error:
            faults.append(f"{name} line {number} {error}")
        else:
            prompts.append(Prompt(number, prompt))
    return prompts, faults


def _prompt(line: str) -> str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('has no "prompt"; each line is an object such as {"prompt": "..."}')
    return prompt


class Records:
    """Results, of earlier runs and of this one, that another process writes down."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records  # those of earlier runs

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record as it reads back."""
        return json.loads(json.dumps(dict(record)))


class RecordFile(Records):
    """A JSONL file of results, open to append to; made by `resumed`."""

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        super().__init__(records)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record as it reads back, after it is written: one line, on its way to the disk.

        Raises:
          UserError: the disk is full.
        """
        line = json.dumps(dict(record))
        try:
            self._file.write(f"{line}\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(self.path, error) from error
        return json.loads(line)

    def close(self) -> None:
        """Ends writing.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._file.close()
        except OSError as error:
            raise disk_error(self.path, error) from error


@contextmanager
def resumed(
    path: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any] | None = None
) -> Iterator[RecordFile]:
    """The file at `path`, new or with the records that an earlier run of the same settings left there.

        {"settings": {...}, "made_with": {...}}
        {...}

    A last line that a kill cut short is dropped. The file is locked while it is open.

    Args:
      settings: what makes two runs the same; they may differ in nothing else that is written.
      made_with: versions and command, for the reader; may differ between runs.
    Raises:
      UserError: the file is of other settings (named) or something else, another process writes it, or the disk is
        full.
    """
    header = {"settings": dict(settings)} | ({} if made_with is None else {"made_with": dict(made_with)})
    with locked_file(path):
        try:
            records = _earlier(path, json.loads(json.dumps(header["settings"])))
            if records is None:
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            file = RecordFile(path, records or [])
        except OSError as error:
            raise disk_error(path, error) from error
        with closing(file):
            yield file


def _earlier(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The records of an earlier run, whose cut-off last line is removed; None where there is no whole header yet."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and (content.startswith(_HEADER) or _HEADER.startswith(content)):
        return None
    theirs, records = read_records(path)
    if others := differing(theirs, settings):
        raise UserError(f"{path} was begun with other settings ({others}); choose another --out or delete it")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return records


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, records) of a file that `resumed` made; a last line that was cut off is left out.

    Raises:
      UserError: no such file, or another; a broken line, by its number.
    """
    if not path.is_file():
        raise UserError(f"no records at {path}; --out {path} makes them")
    parsed = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            parsed.append(json.loads(decoded(line, "it")))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): no file of sva's; give another") from error
    header, *records = parsed or [None]
    if not isinstance(header, dict) or not isinstance(header.get("settings"), dict):
        raise UserError(f"{path} has no settings in its first line, so sva did not begin it; give another")
    for number, record in enumerate(records, start=2):
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not an object: no file of sva's; give another")
    return header["settings"], records
