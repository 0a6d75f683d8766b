"""`sva sweep`: the training runs of a grid of settings, here one after another or through a launcher, and their table.

    config: configs/smollm2-largest.yaml       # or a list: an axis of the grid
    overrides: [evaluate.size=240]             # of every cell
    grid: {seed: [0, 1, 2], train.lr: [1e-2, 3e-3]}
    dir: runs/largest-rates                    # a directory a cell; by default runs/ and this file's name

A cell is a run directory of `sva train`: finished ones are left alone, one that was stopped goes on, and so does the
sweep, on another day too. The table says of every cell what it came to, or that it was not run.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sva.utils.errors import UserError
from sva.utils.files import decoded, read_json
from sva.utils.remote import local_argument, local_path, reaching, to_path
from sva.utils.settings import Setting, is_null, leaves, override, pairs, parse, value_of
from sva.utils.trees import nearest

_TEXT = "Train the experts of a grid of settings, and print one table of what came of them."
_KEYS = ("config", "overrides", "grid", "dir")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a sweep."""

    name: str
    config: str
    overrides: tuple[str, ...]
    run_dir: Path
    seedless: str  # the name without its seed: cells that share it are repetitions

    @property
    def words(self) -> list[str]:
        """Of the `sva` command that runs it."""
        return ["train", self.config, *self.overrides, override("run_dir", str(self.run_dir))]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sweep",
        help=_TEXT,
        description=f"{_TEXT} Stopped at any moment, the same command goes on.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("sweep", type=local_argument, help="a YAML file, see configs/sweeps/")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--table", action="store_true", help="run nothing, print what there is")
    how.add_argument("--dry-run", action="store_true", help="run nothing, print the commands")
    parser.add_argument(
        "--launch",
        help="instead of training here, a command that takes each run, e.g. 'scripts/launch.py slurm --name {cell} --'",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    cells = read(arguments.sweep)
    todo = [] if arguments.table else [cell for cell in cells if not _result(cell)]
    if arguments.dry_run:
        print("\n".join(shlex.join(_launched(cell, arguments.launch)) for cell in todo))
        return
    failed = _launch(todo, arguments.launch) if arguments.launch else _train(todo, cells)
    found = table(cells, failed)
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed; the table says why, and the rest is done")


def read(path: Path) -> list[Cell]:
    """The cells of a sweep's file, in order: the last axis changes fastest.

    Raises:
      UserError: no such file, something else than the settings of a sweep, a setting that `sva train` would refuse.
    """
    from sva.training import config

    path = local_path(path, "a sweep")
    asked = _asked(path)
    configs, axes = _configs(asked, path), _axes(asked, path)
    common = _overrides(asked, path)
    directory = to_path(_text(asked["dir"], "dir", path) if "dir" in asked else Path("runs") / path.stem)
    cells = []
    for file, values in itertools.product(configs, itertools.product(*axes.values())):
        named = [f"{name}={value.name}" for name, value in zip(axes, values, strict=True)]
        stem = [Path(file).stem] if len(configs) > 1 else []
        name, seedless = (
            "_".join([*stem, *kept]).replace("/", "-") or Path(file).stem
            for kept in (named, [axis for axis in named if not axis.startswith("seed=")])
        )
        cells.append(Cell(name, file, (*common, *(value.override for value in values)), directory / name, seedless))
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {names.count(name)} cells are called {name}; leave out repeated values")
    for cell in cells:
        config.load(cell.config, cell.words[2:])  # all faults are told before anything runs
    return cells


class _Value(NamedTuple):
    """One value of an axis: as a cell's name has it, and as an override that is read back as the same."""

    name: str
    override: str


def _asked(path: Path) -> dict[str, Any]:
    """The YAML nodes of a sweep's settings."""
    if not path.is_file():
        raise UserError(f"no sweep at {path}; see configs/sweeps/ for examples")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    node = parse(decoded(content, f"{path} is not readable as YAML: it"), str(path))
    needs = f"{path} is no sweep; it needs `config:`, a configuration of sva train or a list of them"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(needs)
    asked = dict(pairs(node, str(path)))
    for key in asked:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown setting {key!r}{nearest(key, _KEYS)}")
    if "config" not in asked:
        raise UserError(needs)
    return {key: node for key, node in asked.items() if key == "config" or not is_null(node)}


def _text(node: Any, name: str, path: Path) -> str:
    return value_of(node, Setting(str, False, False), name, str(path))


def _configs(asked: Mapping[str, Any], path: Path) -> list[str]:
    node = asked["config"]
    found = [_text(one, "config", path) for one in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
    if not found:
        raise UserError(f"{path}: config is an empty list; name a configuration of sva train")
    return found


def _axes(asked: Mapping[str, Any], path: Path) -> dict[str, list[_Value]]:
    """The values of each axis of the grid, by the setting's dotted name."""
    from sva.training.config import SETTINGS

    where = f"{path}: grid"
    if "grid" not in asked:
        return {}
    axes = {}
    if not isinstance(asked["grid"], yaml.MappingNode):
        raise UserError(f"{where} must give every setting a list of values, e.g. grid: {{seed: [0, 1, 2]}}")
    for name, node in leaves(pairs(asked["grid"], where), SETTINGS, where):
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise UserError(f"{where} must give every setting a list of values, e.g. grid: {{{name}: [A, B]}}")
        axes[name] = []
        for one in node.value:
            value = value_of(one, SETTINGS[name], name, where)
            axes[name].append(_Value(_called(one, value), override(name, value)))
    return axes


def _called(node: Any, value: Any) -> str:
    """A value in a cell's name: text and numbers as they are written, but 0.010 as 0.01."""
    if isinstance(node, yaml.ScalarNode) and not isinstance(value, bool) and value is not None:
        is_decimal = isinstance(value, float) and "e" not in node.value.lower()
        return json.dumps(value) if is_decimal and "." in node.value else str(node.value)
    return json.dumps(value)


def _overrides(asked: Mapping[str, Any], path: Path) -> list[str]:
    """The overrides of every cell, from a list of name=value or from settings as a configuration has them."""
    from sva.training.config import SETTINGS

    where, node = f"{path}: overrides", asked.get("overrides")
    if node is None:
        return []
    if isinstance(node, yaml.MappingNode):
        found = leaves(pairs(node, where), SETTINGS, where)
        return [override(name, value_of(value, SETTINGS[name], name, where)) for name, value in found]
    if not isinstance(node, yaml.SequenceNode) or not all(
        isinstance(one, yaml.ScalarNode) and "=" in str(one.value) for one in node.value
    ):
        raise UserError(f"{where} must be a list of name=value, e.g. overrides: [evaluate.size=240]")
    return [one.value for one in node.value]


def _launched(cell: Cell, launcher: str | None) -> list[str]:
    prefix = shlex.split(launcher.replace("{cell}", cell.name)) if launcher else ["sva"]
    return [*prefix, *cell.words]


def _launch(todo: Sequence[Cell], launcher: str) -> dict[str, str]:
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


def _train(todo: Sequence[Cell], cells: Sequence[Cell]) -> dict[str, str]:
    """Runs the cells, and says first how long that may take; returns what went wrong, by cell."""
    from sva.training import config
    from sva.training import run as runs

    failed: dict[str, str] = {}
    for place, cell in enumerate(todo):
        taken = [result["seconds"] for result in map(_result, cells) if result]
        left = f"about {statistics.mean(taken) * (len(todo) - place) / 60:.0f} minutes left" if taken else "the first"
        print(f"sva: cell {place + 1} of {len(todo)}, {cell.name}; {left}", file=sys.stderr)
        try:
            runs.train(config.load(cell.config, cell.words[2:]))
        except (UserError, FloatingPointError) as error:
            failed[cell.name] = str(error)
            print(f"sva: {cell.name}: {error}", file=sys.stderr)
    return failed


def _result(cell: Cell) -> dict[str, Any] | None:
    path = cell.run_dir / "result.json"
    with reaching(path):
        return read_json(path) if path.exists() else None


def table(cells: Sequence[Cell], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What is known of every cell, and over the seeds of those that differ by nothing else.

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


def _row(cell: Cell, failure: str | None) -> dict[str, Any]:
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
