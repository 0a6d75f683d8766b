"""The task of telling tasks apart, for the classification expert of the first pass.

In its `reference` form (commit 03a41ae of SakanaAI/self-adaptive-llms) the labels are code, math, reasoning and other;
the question is a system message from the user's copy of that code, in front of the task's own; the first boxed word is
the answer, letter for letter, and anything else is "other" (`sva.tasks.reference.verdicts.category`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sva.tasks import mbpp
from sva.tasks.base import Example, Grade, Task
from sva.tasks.code import CodeTask
from sva.tasks.grading.wrappings import unwrapped
from sva.tasks.labels import OTHER, Label, instruction
from sva.tasks.reference import public_code, verdicts
from sva.utils.errors import UserError

CATEGORIES = ("code", "math", "reasoning", OTHER)  # of the public code
_PUBLIC_LABELS = {"science": "reasoning"}  # of sva's labels, those with another name there
_ROWS = 399  # of each task, as many as MBPP+ 0.1.0 has


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


def public_label(task: Task) -> str:
    """The public code's category of a task's questions."""
    label = _PUBLIC_LABELS.get(task.label, task.label)
    return label if label in CATEGORIES else OTHER


def _public_rows(tasks: Sequence[Task], split: str) -> list[Example]:
    """The first 399 test rows of each task, one task after the other: of five in a row four train or validate, in turn.

    MBPP's are all of its rows, in file order.
    """
    rows = []
    for task in tasks:
        source = mbpp.upstream_rows("0.1.0") if isinstance(task, mbpp.Mbpp) else task.source("test")
        first = [source[i] for i in range(min(len(source), _ROWS))]
        rows += [{"question": task.question(x), "label": public_label(task), "of": task.name} for x in first]
    pool = [row for i, row in enumerate(rows) if i % 5 < 4]
    if split == "test":
        return [row for i, row in enumerate(rows) if i % 5 == 4]
    return pool[split == "validation" :: 2]


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

    def __post_init__(self) -> None:
        if self.splits == "reference" and self.grader != "reference":
            raise UserError("task routing: splits=reference has the public code's labels; add grader=reference")

    def _rows(self, split: str) -> Sequence[Example]:
        if self.splits == "reference":
            return _public_rows(self.tasks, split)
        return _Turns([(task, task.source(split)) for task in self.tasks])

    @property
    def system(self) -> str:
        return public_code.classification_prompt() if self.prompt == "reference" else ""

    def framed(self, example: Example) -> str | None:
        """The public code's template for programs around the question of one, without the first words of an answer."""
        tasks = {task.name: task for task in self.tasks}
        if self.prompt != "reference" or not isinstance(tasks.get(example.get("of", "")), CodeTask):
            return None
        return public_code.filled(public_code.code_prompt(), self.turns(example))

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            return example["question"]
        return instruction(self.labels, example["question"])

    def answer(self, example: Example) -> str:
        """The label, boxed in the reference form."""
        return f"\\boxed{{{example['label']}}}" if self.grader == "reference" else example["label"]

    def grade(self, completion: str, example: Example) -> Grade:
        """Right if the first word of the completion is the label; in the reference form, the first boxed word."""
        if self.grader == "reference":
            found = verdicts.category(completion, CATEGORIES)
            return Grade(found == _PUBLIC_LABELS.get(example["label"], example["label"]), found)
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
