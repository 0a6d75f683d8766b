"""One line of numbers a step: JSONL, TensorBoard and the progress bar."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

# Protobuf makes these when it is imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from sva.utils.files import disk_error, read_lines, write_atomically


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one run; a resumed run continues after its last saved step.

    Both are written at once and in this thread: `SummaryWriter` writes in another, where a full disk is a traceback.
    """

    def __init__(self, directory: Path, step: int) -> None:
        """Rows of `step` and later, which an interrupted run wrote before it could save, are dropped.

        Raises:
          UserError: the disk is full, or the directory cannot be written to.
        """
        self._path = directory / "metrics.jsonl"
        rows = [row for row in read(self._path) if row["step"] < step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self._path, lambda path: path.write_text(text))
        board = directory / "tensorboard"
        try:
            self._file = self._path.open("a")
            board.mkdir(exist_ok=True)
            self._board = EventsWriter(str(board / "events"))
        except OSError as error:
            raise disk_error(directory, error) from error
        self._board.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))  # hides later steps

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row, which has a `step`; a number that is NaN or infinite is null, which JSON can say.

        Raises:
          UserError: the disk is full.
        """
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        try:
            known = {name: None if _is_no_number(value) else value for name, value in row.items()}
            self._file.write(json.dumps(known) + "\n")
            self._file.flush()
            self._board.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
            self._board.flush()
        except OSError as error:
            raise disk_error(self._path.parent, error) from error

    def close(self) -> None:
        """Closes both; what could not be written has been said by `write`."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out; empty where there is no file."""
    rows = []
    for line in read_lines(path) if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
