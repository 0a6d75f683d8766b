"""Methods side by side on the chosen tasks: scores, differences from the base and one of them, the paper's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.paper import scores
from experiments.paper.command import Context
from experiments.paper.methods import METHODS
from experiments.paper.paper_numbers import BASE
from experiments.paper.records import devices
from experiments.paper.render import Table, basis, beside, millions, p_value, percent, points
from experiments.paper.scores import Group


class Side(NamedTuple):
    """One method on every task."""

    method: str
    groups: Mapping[str, Group]  # by task

    @property
    def parameters(self) -> int | None:
        """How many numbers it trains."""
        return next((record["parameters"] for group in self.groups.values() for record in group.records), None)


def sides(context: Context, methods: Sequence[str], examples: int | None = None) -> list[Side]:
    """The methods whose learning rate is decided; the others have no cells yet, and empty groups."""

    def cells(method: str, task: str) -> Group:
        return scores.group(context.cells(method, task, examples), context.store)

    return [Side(method, {task: cells(method, task) for task in context.known.tasks}) for method in methods]


def tables(
    title: str,
    found: Sequence[Side],
    paper: Mapping[str, Sequence[float]],
    paper_tasks: Sequence[str],
    reference: str = "lora",
    notes: Sequence[str] = (),
) -> tuple[list[Table], dict[str, Any]]:
    """([scores, differences], data): every method beside the paper's numbers, where the paper has them.

    The paper's rows of methods that `found` lacks stand below.

    Args:
      reference: the method that the others are compared with, beside the base.
    """
    tasks = list(found[0].groups)
    some = [group for side in found for group in side.groups.values() if group.records]
    base = {task: _base(found, task) for task in tasks}
    rows = [("base", "0", *(percent(base[task]) for task in tasks), beside("base", paper))]
    data: dict[str, Any] = {"base": base, "methods": {}}
    for side in found:
        by_task = {task: scores.score(group) for task, group in side.groups.items()}
        texts = [percent(by_task[task], group.status) for task, group in side.groups.items()]
        rows.append((METHODS[side.method].title, millions(side.parameters), *texts, beside(side.method, paper)))
        status = {task: group.status for task, group in side.groups.items()}
        data["methods"][side.method] = {"parameters": side.parameters, "scores": by_task, "status": status}
    more = [name for name in paper if name != "base" and name not in data["methods"]]
    rows += [(f"the paper's {METHODS[name].title}", *[""] * (1 + len(tasks)), beside(name, paper)) for name in more]
    n = sorted({record["n"] for group in some for record in group.records})
    seeds = max((len(group.records) for group in some), default=0)
    about = (
        f"Accuracy in %, greedy answers, mean of up to {seeds} seeds, with a 95 % interval over items and seeds; "
        f"n = {', '.join(map(str, n)) or 'none'} held-out prompts a task.",
        f"Trained on {devices([record for group in some for record in group.records]) or 'nothing yet'}.",
        *([f"The paper's: {' / '.join(paper_tasks)} of {BASE}."] if paper else []),
    )
    header = ("method", "trained numbers", *tasks, *(["the paper's"] if paper else []))
    rows = [row if paper else row[:-1] for row in rows]
    differences, numbers = _differences(found, tasks, reference)
    return [Table(title, header, tuple(rows), (*about, *notes)), differences], data | numbers


def _differences(found: Sequence[Side], tasks: Sequence[str], reference: str) -> tuple[Table, dict[str, Any]]:
    """Every method less the base, and less the reference, task by task, corrected for the number of them."""
    beside = next(side for side in found if side.method == reference)
    entries = []
    for side in found:
        for task in tasks:
            entries.append((side.method, "base", task, scores.against_base(side.groups[task])))
            if side is not beside:
                difference = scores.compared(side.groups[task], beside.groups[task])
                entries.append((side.method, reference, task, difference))
    corrected = scores.corrected([difference for *_, difference in entries])
    rows, data = [], []
    for (method, other, task, difference), p in zip(entries, corrected, strict=True):
        if difference is not None:
            what = f"{METHODS[method].title} less {other if other == 'base' else METHODS[other].title}"
            detectable = f"{100 * difference.detectable:.1f}"
            rows.append((what, task, points(difference), basis(difference), p_value(p), detectable))
            data.append({"method": method, "less": other, "task": task, **difference._asdict(), "p_holm": p})
    notes = (
        "Paired over items and the seeds that both have (with one seed over items alone), 95 % bootstrap intervals in "
        "points; p by Holm over all lines of this table.",
        "The last column is the true difference that would show in four experiments of five like these.",
    )
    header = ("difference", "task", "points", "seeds x n", "p", "detectable")
    return Table("Differences", header, tuple(rows), notes), {"differences": data}


def _base(found: Sequence[Side], task: str) -> dict[str, float] | None:
    """The base's accuracy, from any record of the task."""
    groups = [side.groups[task] for side in found if side.groups[task].records]
    return dict(groups[0].records[0]["before"]) if groups else None
