"""Table 3: what the two passes cost, seconds of the first and of the second over each task's prompts.

python -m experiments.paper.table3 --scale smol
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper import command, paper_numbers, render
from experiments.paper.command import Context
from experiments.paper.records import devices
from experiments.paper.scores import Group
from sva.tasks.labels import OTHER

NAME, STAGES = "table3", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table3.md, .tex and .json; returns the Markdown."""
    seen, unseen = (*context.known.tasks, OTHER), context.known.unseen
    groups = {task: context.studies("dispatch", tasks=tasks) for tasks in (seen, unseen) for task in tasks}
    seconds = {task: [_seconds(record, task) for record in group.records] for task, group in groups.items()}
    rows = [_row(task, runs, groups[task]) for task, runs in seconds.items()]
    records = [record for tasks in (seen, unseen) for record in context.studies("dispatch", tasks=tasks).records]
    rows += [_row(f"the paper's {task}", [pair]) for task, pair in paper_numbers.TABLE3.items()]
    notes = (
        "The first pass scores the labels of one question (`prompt`); compiling is left out; the seed whose two passes "
        "together took least.",
        f"Ours on {devices(records) or 'nothing yet'}, on answers of a few tokens; the paper's with Llama3-8B on GPUs.",
    )
    table = render.Table(
        "Table 3: seconds of both passes", ("task", "n", "first", "second", "first's share"), tuple(rows), notes
    )
    return render.write(NAME, [table], {"seconds": seconds}, context.command, out)


def _seconds(record: Mapping[str, Any], task: str) -> tuple[float, float]:
    return record["costs"][task]["first"], record["costs"][task]["second"]


def _row(task: str, runs: Sequence[tuple[float, float]], group: Group | None = None) -> tuple[str, ...]:
    """The run whose two passes together took least, or why there is none."""
    if not runs:
        return task, "", group.status if group else "", "", ""
    first, second = min(runs, key=sum)
    n = str(group.records[0]["tasks"].count(task)) if group else ""
    return task, n, f"{first:.2f}", f"{second:.2f}", f"{first / (first + second):.0%}"


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
