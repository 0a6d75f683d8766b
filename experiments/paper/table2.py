"""Table 2: tasks that no expert was trained on, by each way to choose or mix experts.

python -m experiments.paper.table2 --scale smol
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper import command, paper_numbers, plan, render, systems
from experiments.paper.command import Context
from experiments.paper.methods import METHODS
from experiments.paper.scores import Group
from experiments.paper.systems import System
from sva.tasks.labels import OTHER

NAME, STAGES = "table2", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table2.md, .tex and .json; returns the Markdown."""
    tasks = context.known.unseen
    title = f"Table 2: unseen tasks, experts of {', '.join(context.known.tasks)}"
    notes = (
        "Best expert: the single one that is best on the task in hindsight; oracle: the expert of the task's label.",
        f"The paper's: {' / '.join(paper_numbers.TABLE2_TASKS)} of {paper_numbers.BASE}, not our tasks or model.",
    )
    titles = {name: METHODS[name].title for name in ("lora_attention_next", "ia3")} | {"dora": "DoRA"}
    paper = {titles.get(name, name): row for name, row in paper_numbers.TABLE2.items()}
    table, data = systems.table(title, of(context, tasks), tasks, paper, notes)
    return render.write(NAME, [table], data, context.command, out)


def of(context: Context, tasks: Sequence[str]) -> dict[str, System]:
    """Every system on the tasks of one dispatch study, few-shot search beside them."""
    dispatch = dict.fromkeys(tasks, context.studies("dispatch", tasks=tuple(tasks)))
    shots, generations = plan.SEARCHES[0]
    about = {"shots": shots, "generations": generations}
    search = {task: context.studies("search", task=task, **about) for task in tasks}

    def asked(name: str) -> System:
        return systems.system(dispatch, lambda record, task: systems.of_task(record, name, task))

    def searched(name: str) -> System:
        return systems.system(search, lambda record, _: record["rights"][name][: plan.ROUTES])

    return {
        "base": systems.either(asked("other everywhere"), searched("base")),
        "best expert": _best(dispatch),
        **{name: asked(name) for name in (*plan.FIRST, "oracle")},
        "few-shot": searched("few-shot"),
    }


def _best(dispatch: Mapping[str, Group]) -> System:
    """The expert with most right answers to each task's test prompts, over all seeds."""
    best = {}
    for task, group in dispatch.items():
        right: Counter[str] = Counter()
        for record in group.records:
            names = [f"{label} everywhere" for label in record["labels"] if label != OTHER]
            right.update({name: sum(systems.of_task(record, name, task)) for name in names})
        best[task] = max(right, key=right.__getitem__, default="")

    def rights(record: Mapping[str, Any], task: str) -> list[int]:
        return systems.of_task(record, best[task], task)

    return systems.system(dispatch, rights, is_hindsight=True)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
