"""Table 2: tasks that no expert was trained on, by each way to choose or mix experts.

python -m experiments.paper.table2 --scale smol
"""

from pathlib import Path

import numpy as np

from experiments.paper import command, paper_numbers, plan, render, systems
from experiments.paper.command import Context

NAME, STAGES = "table2", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table2.md, .tex and .json; returns the Markdown."""
    tasks = context.known.unseen
    rights = of(context, tasks)
    title = f"Table 2: unseen tasks, experts of {', '.join(context.known.tasks)}"
    notes = (
        "Best expert: the single one that is best on the task in hindsight; oracle: the expert of the task's label.",
    )
    paper = {name.replace("few_shot", "few-shot"): row for name, row in paper_numbers.TABLE2.items()}
    table, data = systems.table(title, rights, tasks, paper, notes)
    return render.write(NAME, [table], data, context.command, out)


def of(context: Context, tasks: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    """{system: {task: [S, n]}} on tasks of one dispatch study, few-shot search among them where it was run."""
    found: dict[str, dict[str, np.ndarray]] = {"base": {}}
    records = [record for record in context.studies("dispatch") if set(tasks) <= set(record["tasks"])]
    for task in tasks if records else ():
        found["base"][task] = systems.stacked(records, "other everywhere", task)
        singles = [name for name in records[0]["rights"] if name.endswith(" everywhere") and "other" not in name]
        best = max((systems.stacked(records, name, task) for name in singles), key=np.mean)
        found.setdefault("best expert", {})[task] = best
        for name in (*plan.FIRST, "oracle"):
            found.setdefault(name, {})[task] = systems.stacked(records, name, task)
        shots, generations = plan.SEARCHES[0]
        searched = context.studies("search", task=task, shots=shots, generations=generations)
        if searched:
            size = best.shape[1]
            rows = [record["rights"]["few-shot"][:size] for record in searched]
            found.setdefault("few-shot", {})[task] = np.array(rows, bool)
    return found


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
