"""What tables 8 and 10 share: few-shot search with other shots and budgets, on the first unseen task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.paper import render, systems
from experiments.paper.command import Context


def make(
    title: str, budgets: Mapping[str, tuple[int, int]], paper: Mapping[str, Sequence[float]], context: Context
) -> tuple[render.Table, dict]:
    """The table of these budgets {name: (shots, generations)}, the base first."""
    task = context.known.unseen[0] if context.known.unseen else ""
    rights: dict[str, dict[str, np.ndarray]] = {"base": {}}
    for label, (shots, generations) in budgets.items():
        records = context.studies("search", task=task, shots=shots, generations=generations)
        rights[label] = {}
        if records:
            rights[label][task] = np.array([record["rights"]["few-shot"] for record in records], bool)
            rights["base"][task] = np.array([record["rights"]["base"] for record in records], bool)
    return systems.table(f"{title}, {task}", rights, (task,), paper)


def write(name: str, made: tuple[render.Table, dict], context: Context, out: Path) -> str:
    """Writes the table's files; returns the Markdown."""
    table, data = made
    return render.write(name, [table], data, context.command, out)
