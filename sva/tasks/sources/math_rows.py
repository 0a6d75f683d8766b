"""The rows of MATH (Hendrycks et al., arXiv 2103.03874), from the user's copy: its publisher has withdrawn it."""

import gzip
import hashlib
import json
from pathlib import Path

from sva.tasks.grading import math_answers
from sva.tasks.sources import upstream
from sva.utils.errors import UserError
from sva.utils.paths import data_dir

LICENCE = "MIT"
FIELDS = ("problem", "level", "type", "solution")


def place() -> Path:
    """The user's copy: a folder MATH (train/ and test/, a JSON file for each problem) or math_train.jsonl[.gz] and
    math_test.jsonl[.gz], in `data_dir()`.

    Raises:
      UserError: neither is there; MATH is not fetched, for its publisher has withdrawn it.
    """
    folder = data_dir()
    if folder and (folder / "MATH" / "test").is_dir():
        return folder / "MATH"
    if folder and _file(folder, "test"):
        return folder
    searched = folder or "$SVA_DATA (not set)"
    raise UserError(
        f"no data: neither a folder MATH with train/ and test/ nor math_test.jsonl is in {searched}; set $SVA_DATA "
        "to a folder that has one"
    )


def _file(folder: Path, split: str) -> Path | None:
    return next((path for end in ("", ".gz") if (path := folder / f"math_{split}.jsonl{end}").is_file()), None)


def _files(split: str) -> list[Path]:
    root = place()
    if root.name == "MATH":
        return sorted((root / split).glob("*/*.json"), key=lambda path: (path.parent.name, len(path.name), path.name))
    file = _file(root, split)
    return [file] if file else []


def fingerprint() -> str:
    """Changes with the user's files: their names, sizes and times."""
    content = hashlib.blake2s(digest_size=6)
    for split in ("train", "test"):
        for path in _files(split):
            content.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return content.hexdigest()


def upstream_rows(split: str) -> list[upstream.Row]:
    """All problems of upstream's train or test part, by subject and number, or in the order of the file.

    Raises:
      UserError: there are none, a file is damaged, or a problem has no boxed answer; each by its file and line.
    """
    files = _files(split)
    if not files:
        raise UserError(f"no data: {place()} has no {split} problems of MATH")
    rows = []
    for path in files:
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it anew") from error
        lines = [content] if path.suffix == ".json" else content.splitlines()
        for number, line in enumerate(lines, start=1):
            where = str(path) if path.suffix == ".json" else f"{path}, line {number}"
            try:
                row = json.loads(line)
                row = {name: str(row.get(name, "")) for name in FIELDS} | {
                    name: str(row[name]) for name in ("problem", "solution")
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{where} is not a problem of MATH ({error!r}); it needs problem and solution"
                ) from error
            if math_answers.boxed(row["solution"]) is None:
                raise UserError(f"{where}: the solution has no \\boxed{{}} answer")
            rows.append(row)
    return rows
