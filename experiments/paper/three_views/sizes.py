"""What is compared, and how large: `smol` is the table's, `toy` for tests.

Tasks are the three that the rule of `experiments/paper/tasks.py` chose before any comparison (`experiments/LOG.md`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.paper.tasks import task
from sva.generation.testing import NameAColour
from sva.tasks.base import Example, Grade, Task

Rates = tuple[float, ...]


@dataclass(frozen=True)
class Size:
    """Model, tasks and budgets; every method has the same prompts, steps and number of learning rates to try."""

    name: str
    model: str
    tasks: tuple[str, ...]  # each with a label of its own
    steps: int  # updates of one specialist, one expert, and the mixture's router
    prompts: int  # solved training prompts an update
    held_out: int  # test prompts of each task
    validation: int  # prompts of each task, on which learning rates are chosen
    examples: int  # labelled training prompts of each task that a router over embeddings is fitted to
    seeds: tuple[int, ...]
    rates: tuple[tuple[str, Rates], ...]  # by method of `train.METHODS`

    def rates_of(self, method: str) -> Rates:
        """The learning rates that are tried, the lowest first."""
        return dict(self.rates)[method]

    def made(self) -> tuple[Task, ...]:
        """The tasks themselves."""
        return tuple(_TOYS[name] if self.model == "toy" else task(name) for name in self.tasks)


@dataclass(frozen=True, kw_only=True)
class InTurn(Task):
    """Several tasks as one: a row of each in turn, until the shortest has no more."""

    tasks: tuple[Task, ...]

    def _rows(self, split: str) -> Sequence[Example]:
        rows = [each.source(split) for each in self.tasks]
        turns = range(min(map(len, rows)))
        return [{**rows[at][turn], "task": at} for turn in turns for at in range(len(self.tasks))]

    def question(self, example: Example) -> str:
        return self.tasks[example["task"]].question(example)

    def grade(self, completion: str, example: Example) -> Grade:
        return self.tasks[example["task"]].grade(completion, example)


def in_turn(tasks: Sequence[Task]) -> InTurn:
    """These tasks as one."""
    return InTurn(
        name="all",
        label="all",
        description=", ".join(each.name for each in tasks),
        max_new_tokens=max(each.max_new_tokens for each in tasks),
        licence="as its tasks",
        origin=", ".join(each.name for each in tasks),
        tasks=tuple(tasks),
    )


@dataclass(frozen=True, kw_only=True)
class SayAWord(NameAColour):
    """Answer with one word, whatever the question, which says what kind of word it is to be."""

    asked: str
    word: str

    def _rows(self, split: str) -> Sequence[Example]:
        return [{**row, "answer": self.word} for row in super()._rows(split)]

    def question(self, example: Example) -> str:
        return f"what {self.asked} the {example['thing']} of the {example['of']} ?"

    def grade(self, completion: str, example: Example) -> Grade:
        """Right if the first word is the one."""
        found = re.search(r"\w+", completion)
        answer = found[0] if found else None
        return Grade(answer == self.word, answer)


_TOYS = {
    asked: SayAWord(name=asked, label=asked, description=f"a {asked}", asked=asked, word=word)
    for asked, word in (("colour", "red"), ("thing", "boat"), ("category", "lamp"))
}

SMOL = Size(
    name="smol",
    model="smollm2-135m-instruct-q4_1",
    tasks=("sort3", "next_number", "last_letter"),
    steps=12,
    prompts=16,
    held_out=100,
    validation=20,
    examples=100,
    seeds=(0, 1, 2),
    rates=(("full", (1e-5, 3e-5, 1e-4)), ("svf", (1e-2, 3e-2, 1e-1)), ("router", (1e-3, 1e-2, 1e-1))),
)
TOY = Size(
    name="toy",
    model="toy",
    tasks=tuple(_TOYS),
    steps=20,
    prompts=8,
    held_out=8,
    validation=4,
    examples=12,
    seeds=(0, 1),
    rates=(("full", (1e-3, 3e-3)), ("svf", (1e-1, 3e-1)), ("router", (1e-2, 1e-1))),
)
SIZES = {size.name: size for size in (SMOL, TOY)}
