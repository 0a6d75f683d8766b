"""The tasks: their rows in memory, and the rule that chooses three of them on validation, before any comparison.

Rule, written before any cell was trained: scouting cells train SVF and LoRA, each at the middle one of its three
learning rates, on every candidate. A task is eligible where the base is right at most 60 %, both methods end at most
at 90 %, and both together gain at least 5 points on average, on the validation split. Of the eligible ones the three
with the largest mean gain are taken, one a label (letters, arithmetic, ...) before two of any; where fewer are
eligible, the others follow by the same order. The mean over both methods, so that the choice favours neither.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sva.generation.testing import NameAColour
from sva.tasks import procedural
from sva.tasks.base import Example, Task
from sva.tasks.procedural import Procedural
from sva.tasks.routing import Routing, routing
from sva.tasks.sources import kinds

MOST_ROWS = 512
HIGHEST_BASE, HIGHEST_END, LEAST_GAIN = 0.6, 0.9, 0.05


@dataclass(frozen=True, kw_only=True)
class InMemory(Procedural):
    """A procedural task, row by row the same, that is made here and needs no dataset on disk.

    It trains on the first `MOST_ROWS` rows only: the widths of all prompts are measured before each cell.
    """

    def _rows(self, split: str) -> Sequence[Example]:
        return _rows(self.name, split, self.seed)


@functools.cache
def _rows(name: str, split: str, seed: int) -> tuple[Example, ...]:
    return tuple(kinds.rows(name, split, seed))[: MOST_ROWS if split == "train" else None]


@dataclass(frozen=True, kw_only=True)
class Coloured(NameAColour):
    """The toy task with an answer in every row, so that it can be learnt by next-token prediction too."""

    def _rows(self, split: str) -> Sequence[Example]:
        return [{**row, "answer": "red"} for row in super()._rows(split)]


@functools.cache
def task(name: str) -> Task:
    """The task that a cell of that name trains."""
    if name == "name_a_colour":
        return Coloured()
    made = procedural.task(name)
    return InMemory(**{field: getattr(made, field) for field in made.__dataclass_fields__})


def telling_apart(names: Sequence[str]) -> Routing:
    """The task of telling these tasks and "other" apart, for the classification expert.

    Where two of them share a label, all are called by their own names.
    """
    made = [task(name) for name in names]
    if len({each.label for each in made}) < len(made):
        made = [dataclasses.replace(each, **own_label(each.name)) for each in made]
    return routing([*made, task("other")])


def own_label(name: str) -> dict[str, str]:
    """A label of a task's own, one lower-case word as labels are, and its description."""
    return {"label": name.replace("_", ""), "description": name.replace("_", " ")}


class Scouted(NamedTuple):
    """What the scouting cells of one task came to, as fractions."""

    base: float
    ends: Mapping[str, float]  # by method

    @property
    def gain(self) -> float:
        """The mean over methods."""
        return sum(self.ends.values()) / len(self.ends) - self.base

    @property
    def is_eligible(self) -> bool:
        """Whether the rule takes the task before others."""
        return self.base <= HIGHEST_BASE and max(self.ends.values()) <= HIGHEST_END and self.gain >= LEAST_GAIN


def chosen(scouted: Mapping[str, Scouted], number: int) -> tuple[str, ...]:
    """The tasks that the rule above takes, in its order."""
    order = sorted(scouted, key=lambda name: (not scouted[name].is_eligible, -scouted[name].gain))
    taken: list[str] = []
    for is_second in (False, True):  # one a label, then whatever follows
        for name in order:
            is_new = task(name).label not in {task(other).label for other in taken}
            if len(taken) < number and name not in taken and (is_second or (is_new and scouted[name].is_eligible)):
                taken.append(name)
    return tuple(taken)
