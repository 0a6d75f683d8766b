"""What tables 8 and 10 share: few-shot search with other shots and budgets, on the first unseen task."""

from collections.abc import Mapping
from pathlib import Path

from experiments.paper import paper_numbers, render, systems
from experiments.paper.command import Context
from experiments.paper.systems import System


def make(
    title: str, budgets: Mapping[str, tuple[int, int]], paper: Mapping[str, float], context: Context
) -> tuple[render.Table, dict]:
    """The table of these budgets {name: (shots, generations)}, the base first.

    Args:
      paper: its scores on ARC-Challenge.
    """
    tasks = context.known.unseen[:1]
    found: dict[str, System] = {}
    for label, (shots, generations) in budgets.items():
        about = {"shots": shots, "generations": generations}
        groups = {task: context.studies("search", task=task, **about) for task in tasks}
        found[label] = systems.system(groups, lambda record, _: record["rights"]["few-shot"])
        base = systems.system(groups, lambda record, _: record["rights"]["base"])
        found["base"] = systems.either(found["base"], base) if "base" in found else base
    beside = {"base": (paper_numbers.TABLE2["base"][2],), **{name: (score,) for name, score in paper.items()}}
    order = {"base": found["base"], **found}
    return systems.table(", ".join([title, *tasks]), order, tasks, beside)


def write(name: str, made: tuple[render.Table, dict], context: Context, out: Path) -> str:
    """Writes the table's files; returns the Markdown."""
    table, data = made
    return render.write(name, [table], data, context.command, out)
