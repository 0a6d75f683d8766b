"""One line of numbers a step: JSONL, TensorBoard and the progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from sva.files import disk_error, write_atomically


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one run; a resumed run goes on after its last saved step."""

    def __init__(self, directory: Path, step: int) -> None:
        """Rows of `step` and later, which an interrupted run wrote before it could save, are dropped."""
        self._path = directory / "metrics.jsonl"
        rows = [row for row in read(self._path) if row["step"] < step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self._path, lambda path: path.write_text(text))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row, which has a `step`.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps(dict(row)) + "\n")
        except OSError as error:
            raise disk_error(self._path, error) from error
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out; empty where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
