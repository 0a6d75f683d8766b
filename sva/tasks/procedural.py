"""Tasks made from seeds, of the kinds in `sva.tasks.sources.kinds`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading import answers
from sva.tasks.sources import kinds


@dataclass(frozen=True, kw_only=True)
class Procedural(Task):
    """A kind of `kinds.KINDS`, or a mixture.

    `seed` decides what is drawn from a split's words and operands, never which split owns them.
    """

    seed: int = 0

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks.sources import builders  # tensorflow-datasets takes half a second to import

        return builders.procedural(self.name, self.seed, split)

    def question(self, example: Example) -> str:
        return example["question"]

    def grade(self, completion: str, example: Example) -> Grade:
        return answers.grade(completion, kinds.KINDS[example["kind"]].form, [example["answer"], *example["also"]])


def task(name: str, seed: int = 0) -> Procedural:
    """The task of that name, one of `kinds.NAMES`."""
    kind = kinds.KINDS.get(name)
    label = kind.label if kind else name
    return Procedural(
        name=name,
        label=label,
        description=(kind.description if kind else "") or kinds.LABELS[label],
        max_new_tokens=24,
        licence="Apache-2.0",
        origin="made by sva from a seed",
        seed=seed,
    )
