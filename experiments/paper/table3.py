"""Table 3: what the two passes cost, seconds of the first and of the second over each task's prompts.

python -m experiments.paper.table3 --scale smol
"""

from pathlib import Path

from experiments.paper import command, paper_numbers, render
from experiments.paper.command import Context
from experiments.paper.records import devices

NAME, STAGES = "table3", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table3.md, .tex and .json; returns the Markdown."""
    records = context.studies("dispatch")
    seconds: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for task, cost in record["costs"].items():
            seconds.setdefault(task, []).append((cost["first"], cost["second"]))
    rows = [_row(task, min(runs), record_size(records, task)) for task, runs in seconds.items()]
    rows += [_row(f"the paper's {task}", pair, "") for task, pair in paper_numbers.TABLE3.items()]
    notes = (
        "The first pass scores the labels of one question (`prompt`); compiling is left out; the faster of the seeds.",
        f"Ours on {devices(records) or 'nothing yet'}, on answers of a few tokens; the paper's with Llama3-8B on GPUs.",
    )
    table = render.Table(
        "Table 3: seconds of both passes", ("task", "n", "first", "second", "first's share"), tuple(rows), notes
    )
    return render.write(NAME, [table], {"seconds": seconds}, context.command, out)


def record_size(records: list, task: str) -> str:
    """How many prompts of the task the studies ask."""
    return str(next(record["tasks"].count(task) for record in records if task in record["costs"]))


def _row(task: str, pair: tuple[float, float], n: str) -> tuple[str, ...]:
    first, second = pair
    return task, n, f"{first:.2f}", f"{second:.2f}", f"{first / (first + second):.0%}"


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
