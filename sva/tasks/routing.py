"""The task of telling tasks apart, for the classification expert of the first pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading.wrappings import unwrapped
from sva.tasks.labels import OTHER, Label, instruction


class _Turns(Sequence[Example]):
    """Rows of several sources in turn, until the shortest has no more."""

    def __init__(self, sources: Sequence[tuple[Task, Sequence[Example]]]):
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources) * min(len(rows) for _, rows in self._sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, turn = divmod(range(len(self))[index], len(self._sources))
        task, rows = self._sources[turn]
        return {"question": task.question(rows[row]), "label": task.label}


@dataclass(frozen=True, kw_only=True)
class Routing(Task):
    """Classify the question of one of `tasks`, among their labels; each task gives every len(tasks)-th row.

    An example has the `question` as its task would ask it and the `label` of that task. Splits are those of
    the tasks, so what they keep apart stays apart here.
    """

    tasks: tuple[Task, ...]

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels in the order of the tasks, each once, "other" last."""
        found = {task.label: Label(task.label, task.description) for task in self.tasks}
        return tuple(sorted(found.values(), key=lambda label: label.name == OTHER))

    def _rows(self, split: str) -> Sequence[Example]:
        return _Turns([(task, task.source(split)) for task in self.tasks])

    def question(self, example: Example) -> str:
        return instruction(self.labels, example["question"])

    def grade(self, completion: str, example: Example) -> Grade:
        """Right if the first word of the completion is the label."""
        word = re.search(r"[^\W_]+", unwrapped(completion)[:200])
        answer = word[0].lower() if word else None
        return Grade(answer == example["label"], answer)


def routing(tasks: Sequence[Task]) -> Routing:
    """The task of telling `tasks` apart."""
    names = ", ".join(task.name for task in tasks)
    return Routing(
        name="routing",
        label="routing",
        description=f"which of {names} a question belongs to",
        max_new_tokens=8,
        licence="as its tasks",
        origin=names,
        tasks=tuple(tasks),
    )
