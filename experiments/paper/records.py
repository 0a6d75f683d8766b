"""The committed form of a trained cell: one compressed JSON file, whole or not there.

cells/<digest>-<training>-<grading>.json.gz   settings, device, versions, command, seconds, learning curve, and of every
                                              held-out example what the base and the trained model answered
failed/<digest>-<training>-<grading>.json     the error of a cell that could not be trained

The second and third part of a name are the revisions of `revisions.py`.
"""

import functools
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.paper.cells import Cell, digest_of_flat
from experiments.paper.revisions import CURRENT, Revisions
from experiments.paper.studies import Study
from sva.utils.errors import UserError, differing
from sva.utils.files import read_json, write_atomically, write_json

HERE = Path(__file__).parent
ANSWER = ("correct", "answer", "completion", "tokens", "reason")  # of each held-out example, in its order


class Failure(NamedTuple):
    """Why a cell has no record."""

    error: str


class Store:
    """The records under one directory as of the last look, read when they are asked for."""

    def __init__(self, directory: Path = HERE) -> None:
        self.directory = directory
        self._read: dict[str, dict[str, Any]] = {}
        self._names: dict[str, list[str]] = {}  # file names by digest
        self._failed: set[str] = set()
        self.look()

    def look(self) -> None:
        """Lists the directory anew, for what other processes have filed."""
        self._names = {}
        for path in (self.directory / "cells").glob("*-*-*.json.gz"):
            self._names.setdefault(path.name.partition("-")[0], []).append(path.name)
        self._failed = {path.name for path in (self.directory / "failed").glob("*.json")}

    def path(self, cell: Cell | Study) -> Path:
        """Where the record of a cell is, or would be."""
        return self.directory / "cells" / f"{cell.key}.json.gz"

    def expert_path(self, cell: Cell) -> Path:
        """Where the trained expert of a cell is, or would be, for cells whose expert is kept."""
        return self.directory / "experts" / f"{cell.key}.safetensors"

    def failure_path(self, cell: Cell | Study) -> Path:
        """Where its error is, or would be."""
        return self.directory / "failed" / f"{cell.key}.json"

    def get(self, cell: Cell | Study) -> Mapping[str, Any] | Failure | None:
        """The record of a cell, why it failed, or None where it was not run.

        Raises:
          UserError: its record is of another revision, or of other settings than this version has.
        """
        key = cell.key
        if key in self._read:
            return self._read[key]
        if f"{key}.json.gz" in self._names.get(cell.digest, ()):
            record = read(self.path(cell))
            self._check(cell, record)
            self._read[key] = record
            return record
        if others := self.other_revisions(cell):
            found = ", ".join(sorted(f"training {x.training}, grading {x.grading}" for x in others.values()))
            raise UserError(
                f"cell {cell.name} is of another revision ({found}; now training {CURRENT.training}, grading "
                f"{CURRENT.grading}); train it anew: python -m experiments.paper.run_cells --recompute, or where "
                "grading alone is another: --regrade"
            )
        is_failed = f"{key}.json" in self._failed
        return Failure(read_json(self.failure_path(cell))["error"]) if is_failed else None

    def other_revisions(self, cell: Cell | Study) -> dict[Path, Revisions]:
        """The records of this cell's settings under other revisions."""
        own = self.path(cell)
        found = [own.with_name(name) for name in self._names.get(cell.digest, ())]
        return {path: _revisions(path) for path in found if path != own}

    def of_other_gradings(self) -> dict[Path, Path]:
        """{record of the current training and another grading: its path under the current one}."""
        paths = [self.directory / "cells" / name for names in self._names.values() for name in names]
        older = [x for x in paths if _revisions(x).training == CURRENT.training and _revisions(x) != CURRENT]
        return {path: path.with_name(f"{path.name.partition('-')[0]}-{_ending()}") for path in sorted(older)}

    def is_current(self, path: Path) -> bool:
        """Whether a record's file is of the current revisions, and its settings are those of this version."""
        if _revisions(path) != CURRENT:
            return False
        return digest_of_flat(read(path)["config"]) == path.name.split("-")[0]

    def everything(self) -> list[dict[str, Any]]:
        """All records of the current revisions, whatever table they belong to."""
        paths = [self.directory / "cells" / name for names in self._names.values() for name in names]
        return [read(path) for path in sorted(paths) if _revisions(path) == CURRENT]

    def read_so_far(self) -> list[dict[str, Any]]:
        """The records that were asked for by now."""
        return list(self._read.values())

    def put(self, cell: Cell | Study, record: Mapping[str, Any]) -> None:
        """Writes a record at once and whole; those of other revisions and an earlier failure are removed."""
        write_record(self.path(cell), record)
        for old in (*self.other_revisions(cell), self.failure_path(cell)):
            old.unlink(missing_ok=True)
        self.look()

    def remove(self, cell: Cell | Study) -> None:
        """Removes the record of a cell, if there is one."""
        self.path(cell).unlink(missing_ok=True)
        self._read.pop(cell.key, None)
        self.look()

    def fail(self, cell: Cell | Study, error: str, details: str) -> None:
        """Notes why a cell could not be trained."""
        write_json(self.failure_path(cell), {"cell": cell.name, "error": error, "details": details})
        self.look()

    @staticmethod
    def _check(cell: Cell | Study, record: Mapping[str, Any]) -> None:
        now = cell.flat
        then = {name: value for name, value in record["config"].items() if name in now}
        if others := differing(then, {name: now[name] for name in then}):
            raise UserError(
                f"cell {cell.name} was trained with other settings ({others}), because a default changed; train it "
                "anew: python -m experiments.paper.run_cells --recompute"
            )


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record at once and whole, the same bytes for the same content."""
    content = gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0)
    write_atomically(path, lambda place: place.write_bytes(content))


def read(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
      UserError: it is damaged.
    """
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and its cell is trained anew") from error


def _ending() -> str:
    return f"{CURRENT.training}-{CURRENT.grading}.json.gz"


def _revisions(path: Path) -> Revisions:
    _, training, grading = path.name.removesuffix(".json.gz").split("-")
    return Revisions(int(training), int(grading))


def rights(record: Mapping[str, Any], when: str = "after") -> np.ndarray:
    """[n] booleans, which held-out examples were answered rightly; `when` is before or after training."""
    place = ANSWER.index("correct")
    return np.array([bool(row[place]) for row in record["held_out"][when]])


def answers(records: Iterable[Any]) -> list[list[Any]]:
    """What a record keeps of `sva.evaluation.evaluate.Record`s."""
    return [[int(value) if name == "correct" else value for name, value in _named(record)] for record in records]


def _named(record: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(record, name)) for name in ANSWER]


@functools.cache
def store(directory: Path = HERE) -> Store:
    """The committed records, or those of another directory."""
    return Store(directory)


def devices(records: Sequence[Mapping[str, Any]]) -> str:
    """The devices that records were made on: one name, or several with the number of cells of each."""
    names = [record["device"] for record in records]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return (
        next(iter(counts), "")
        if len(counts) < 2
        else ", ".join(f"{name} ({n} of the cells)" for name, n in counts.items())
    )
