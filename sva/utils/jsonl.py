"""Prompts from a file, and results that a job which starts again finds."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sva.utils.errors import UserError
from sva.utils.files import decoded, disk_error


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


class Results:
    """A JSONL file of results, the settings that made them in its first line, to which a later run adds."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Opens `path`, new or started by a run of the same settings; a line that a kill cut short is dropped.

        Raises:
          UserError: the file was written with other settings (which differ is said), or is something else.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        header = json.dumps({"settings": dict(settings)})
        if path.exists() and path.stat().st_size:
            text = path.read_bytes()
            lines = text[: text.rfind(b"\n") + 1].splitlines()
            try:
                known, *self.records = [json.loads(line) for line in lines]
                known = known["settings"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is not a file of results that sva began; name another with --out") from None
            now = json.loads(header)["settings"]
            if differs := [name for name in now.keys() | known.keys() if now.get(name) != known.get(name)]:
                name = min(differs)
                raise UserError(
                    f"{path} was started with {name}={known.get(name)!r}, now it is {now.get(name)!r}; name another "
                    "file with --out, or use the old settings"
                )
            os.truncate(path, text.rfind(b"\n") + 1)
            self._file = path.open("a", encoding="utf-8")
        else:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")
            except OSError as error:
                raise disk_error(path, error) from error
            self._write(header)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes one line; it is on its way to the disk when this returns."""
        self._write(json.dumps(dict(record)))

    def _write(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(self.path, error) from error
