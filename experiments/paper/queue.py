"""A queue of cells that any number of processes share: each claims the next one that nobody has, trains it, files it.

A claim is a lock on a file, which the system lets go of when its process ends, however it ends. What comes next is
asked anew after each cell, because cells of scout and rates decide which follow; a process that finds all named cells
claimed, and more to be decided, waits for the others.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from experiments.paper import costs
from experiments.paper.cells import Cell
from experiments.paper.records import HERE, Failure, Store
from experiments.paper.studies import Study
from experiments.paper.training import device
from sva.utils.errors import UserError

_WAIT = 1.0  # seconds between two looks at what others have finished


Unit = Cell | Study


class Runs(Protocol):
    """What makes a record of a cell or of a study."""

    def run(self, cell: Any) -> dict[str, Any]: ...


class Queue:
    """The cells of a plan, and the store that their records go to."""

    def __init__(self, plan: Callable[[], list[Unit]], store: Store) -> None:
        self._plan, self._store = plan, store

    def work(self, runs: Runs, deadline: float | None = None) -> int:
        """The number of cells trained, in the plan's order, until none is left or none would end by `deadline`.

        Args:
          deadline: seconds since the epoch; a cell starts only where its predicted end is before it.
        """
        done = 0
        while True:
            todo = self.todo()
            if not todo:
                self._tell_waiting()
                return done
            late = self._late(todo, deadline) if deadline else []
            trained = self._one([cell for cell in todo if cell not in late], runs)
            if trained:
                done += 1
            elif len(late) == len(todo):
                print(f"sva: {len(late)} cells would not end in time and are not started", file=sys.stderr)
                return done
            else:
                time.sleep(_WAIT)

    def todo(self) -> list[Unit]:
        """Cells without a record and without an error."""
        self._store.look()
        return [cell for cell in self._plan() if self._store.get(cell) is None and not self._waits(cell)]

    def _waits(self, cell: Unit) -> bool:
        """Whether a study needs a cell that is still to be trained here, or that failed."""
        return bool(lost_experts([cell], self._store))

    def _tell_waiting(self) -> None:
        """Says which experts the studies that are left wait for, and the command that trains them."""
        left = [cell for cell in self._plan() if self._store.get(cell) is None and self._waits(cell)]
        lost = lost_experts(left, self._store)
        if lost:
            stages = " ".join(dict.fromkeys(each.stage for each in (*lost, *left)))
            directory = self._store.directory
            elsewhere = "" if directory == HERE else f" --out {directory}"
            print(
                f"sva: studies that wait: {len(left)}, for experts that are not in {directory / 'experts'}: "
                f"{', '.join(cell.name for cell in lost)}; train them: python -m experiments.paper.run_cells "
                f"--scale {lost[0].scale.name}{elsewhere} --only {stages} --recompute",
                file=sys.stderr,
            )

    def _one(self, todo: list[Unit], runs: Runs) -> bool:
        """Whether a cell of the list was free; it is then trained."""
        for cell in todo:
            with self._claimed(cell) as is_mine:
                if is_mine and not self._store.path(cell).exists():
                    self._train(cell, runs)
                    return True
        return False

    def _train(self, cell: Unit, runs: Runs) -> None:
        print(f"sva: {cell.name}", file=sys.stderr, flush=True)
        started = time.time()
        try:
            record = runs.run(cell)
        except (UserError, FloatingPointError, ValueError, RuntimeError) as error:
            said = str(error).split("\n")[0]
            self._store.fail(cell, f"{type(error).__name__}: {said}", traceback.format_exc())
            print(f"sva: {cell.name} failed: {said}", file=sys.stderr, flush=True)
            return
        self._store.put(cell, record)
        about = ""
        if isinstance(cell, Cell):
            before, after = (100 * record[when]["mean"] for when in ("before", "after"))
            about = f"{before:.1f} % to {after:.1f} % "
        print(f"sva: {cell.name}: {about}in {time.time() - started:.1f} s", file=sys.stderr, flush=True)

    def _late(self, todo: list[Unit], deadline: float) -> list[Unit]:
        """The cells whose predicted end is after the deadline."""
        where = device()
        measured = costs.measured(self._store.read_so_far(), where)
        left = deadline - time.time()
        return [cell for cell in todo if costs.predicted(cell, where, measured).seconds > left]

    @contextlib.contextmanager
    def _claimed(self, cell: Unit) -> Iterator[bool]:
        """Whether this process alone has the cell while the block runs."""
        path: Path = self._store.directory / "claims" / f"{cell.key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def lost_experts(cells: Sequence[Unit], store: Store) -> list[Cell]:
    """The cells whose experts the studies among these read and that have none on disk, each once."""
    needs = [need for cell in cells for need in getattr(cell, "needs", ()) if need.is_kept]
    return [need for need in dict.fromkeys(needs) if not store.expert_path(need).exists()]


def state(cell: Unit, store: Store) -> str:
    """What became of a cell: "done", "not run", or its error."""
    found = store.get(cell)
    if found is None:
        return "not run"
    return f"failed: {found.error}" if isinstance(found, Failure) else "done"
