"""`sva sweep`: the training runs of a grid of settings, here one after another or through a launcher, and their table.

    config: configs/smollm2-largest.yaml       # or a list: an axis of the grid
    overrides: [evaluate.size=240]             # of every cell
    grid: {seed: [0, 1, 2], train.lr: [1e-2, 3e-3]}
    dir: runs/largest-rates                    # a directory a cell; by default runs/ and this file's name

A cell is a run directory of `sva train`: finished ones are left alone, one that was stopped resumes, and so does the
sweep, on another day too. The table says of every cell what it came to, or that it was not run.
"""

import dataclasses
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sva.cli.command_line import Command, argument, option
from sva.cli.options import print_result, start_jax
from sva.utils.errors import TransientError, UserError
from sva.utils.remote import reaching

if TYPE_CHECKING:
    from sva.cli.sweep_file import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train the experts of a grid of settings, and print one table of what came of them.

    Stopped at any moment, the same command resumes.
    """

    sweep: Path = argument("a YAML file, see configs/sweeps/")
    table: bool = option("run nothing, print what there is", False, excludes="how")
    dry_run: bool = option("run nothing, print the commands", False, excludes="how")
    launch: str | None = option(
        "instead of training here, a command that takes each run, e.g. 'scripts/launch.py slurm --name {cell} --'", None
    )
    json: bool = option("print the table as JSON", False)


def run(arguments: Sweep) -> None:
    """Runs the command."""
    from sva.cli.sweep_file import read

    cells = read(arguments.sweep)
    todo = [] if arguments.table else [cell for cell in cells if not _result(cell)]
    if arguments.dry_run:
        print("\n".join(shlex.join(_launched(cell, arguments.launch)) for cell in todo))
        return
    failed = _launch(todo, arguments.launch) if arguments.launch else _train(todo, cells)
    found = table(cells, failed)
    print_result(found, arguments.json, as_text(found))
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed; the table says why, and the rest is done")


def _launched(cell: "Cell", launcher: str | None) -> list[str]:
    prefix = shlex.split(launcher.replace("{cell}", cell.name)) if launcher else ["sva"]
    return [*prefix, *cell.words]


def _launch(todo: Sequence["Cell"], launcher: str) -> dict[str, str]:
    """Hands every cell over; returns what went wrong, by cell."""
    failed = {}
    for cell in todo:
        try:
            code = subprocess.run(_launched(cell, launcher)).returncode
        except OSError as error:
            raise UserError(f"--launch {launcher}: {error.strerror}: {error.filename}") from error
        if code:
            failed[cell.name] = f"the launcher's exit code is {code}"
    return failed


def _train(todo: Sequence["Cell"], cells: Sequence["Cell"]) -> dict[str, str]:
    """Runs the cells, and says first how long that may take; returns what went wrong, by cell."""
    if todo:
        start_jax()
    from sva.training import config
    from sva.training import run as runs

    failed: dict[str, str] = {}
    for place, cell in enumerate(todo):
        taken = [result["seconds"] for result in map(_result, cells) if result]
        left = f"about {statistics.mean(taken) * (len(todo) - place) / 60:.0f} minutes left" if taken else "the first"
        print(f"sva: cell {place + 1} of {len(todo)}, {cell.name}; {left}", file=sys.stderr)
        try:
            runs.train(config.load(cell.config, cell.words[2:]))
        except (UserError, TransientError, FloatingPointError) as error:
            failed[cell.name] = str(error)
            print(f"sva: {cell.name}: {error}", file=sys.stderr)
    return failed


def _result(cell: "Cell") -> dict[str, Any] | None:
    from sva.utils.files import read_json

    path = cell.run_dir / "result.json"
    with reaching(path):
        return read_json(path) if path.exists() else None


def table(cells: Sequence["Cell"], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Result or state of every cell, and gains over the seeds of cells that differ by nothing else.

    Returns:
      {"cells": [{"cell", "status", and where it is done "n", "before", "after", "gain", "steps", "seconds"}],
      "groups": [{"cells", "done", "of", "gain_mean", "gain_low", "gain_high"}]}; accuracies and gains from 0 to 1, the
      gains of a group its smallest, mean and largest.
    """
    rows = [_row(cell, (failed or {}).get(cell.name)) for cell in cells]
    groups = []
    for name in dict.fromkeys(cell.seedless for cell in cells):
        members = [row for row, cell in zip(rows, cells, strict=True) if cell.seedless == name]
        gains = [row["gain"]["mean"] for row in members if "gain" in row]
        group = {"cells": name, "done": len(gains), "of": len(members)}
        if gains:
            group |= {"gain_mean": statistics.mean(gains), "gain_low": min(gains), "gain_high": max(gains)}
        groups.append(group)
    return {"cells": rows, "groups": groups}


def _row(cell: "Cell", failure: str | None) -> dict[str, Any]:
    from sva.training import metrics

    result, steps = _result(cell), cell.run_dir / "metrics.jsonl"
    row: dict[str, Any] = {"cell": cell.name, "run_dir": str(cell.run_dir)}
    if result:
        known = {key: result[key] for key in ("n", "before", "after", "gain", "seconds")}
        return row | {"status": "done", **known, "steps": result["train_steps"]}
    count = len(metrics.read(steps)) if steps.exists() else 0
    stopped = f"stopped after {count} steps" if count else "not run"
    return row | {"status": f"failed: {failure}" if failure else stopped}


def as_text(found: Mapping[str, Any]) -> str:
    """The table as Markdown, accuracies in percent and gains in points with 95 % intervals."""
    from sva.evaluation.stats import percent

    lines = ["| cell | n | base | trained | gain | steps | minutes |", "|---|---|---|---|---|---|---|"]
    for row in found["cells"]:
        if row["status"] != "done":
            lines.append(f"| {row['cell']} | {row['status']} | | | | | |")
            continue
        mean, low, high = (f"{100 * row['gain'][end]:+.1f}" for end in ("mean", "low", "high"))
        lines.append(
            f"| {row['cell']} | {row['n']} | {percent(row['before'])} | {percent(row['after'])} | "
            f"{mean} [{low}, {high}] | {row['steps']} | {row['seconds'] / 60:.1f} |"
        )
    several = [group for group in found["groups"] if group["of"] > 1]
    if several:
        lines += ["", "| over seeds | done | smallest, mean and largest gain |", "|---|---|---|"]
    for group in several:
        gains = [f"{100 * group[f'gain_{key}']:+.1f}" for key in ("low", "mean", "high") if group["done"]]
        lines.append(f"| {group['cells']} | {group['done']} of {group['of']} | {', '.join(gains)} |")
    return "\n".join(lines)


COMMAND = Command("sweep", Sweep, run, (__doc__ or "").partition("\n\n")[2])
