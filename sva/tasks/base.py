"""What a task is: rows to ask about, the words of the question, and a verdict on an answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sva.errors import UserError

Example = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class Grade(NamedTuple):
    """Whether a completion is right, the answer that was found in it (None: no single answer was), and why not."""

    correct: bool
    answer: str | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A named set of examples with a grader; frozen and hashable.

    An example is a plain dict with the field names of wherever it comes from. `label` is the lower-case word
    that a dispatcher answers with for this kind of question, `description` the phrase that explains it; tasks
    may share a label. `max_new_tokens` is what a right answer needs, with some room.
    """

    name: str
    label: str
    description: str
    max_new_tokens: int
    licence: str
    origin: str

    def source(self, split: str) -> Sequence[Example]:
        """The rows of a split, by random access; the same rows in the same order on every call and machine.

        Raises:
          UserError: no such split; the data is absent or damaged.
        """
        if split not in SPLITS:
            raise UserError(f"task {self.name}: no split {split!r}; splits are {', '.join(SPLITS)}")
        return self._rows(split)

    @abstractmethod
    def _rows(self, split: str) -> Sequence[Example]: ...

    @abstractmethod
    def question(self, example: Example) -> str:
        """The text of the user's turn; the chat template is the tokenizer's affair."""

    @abstractmethod
    def grade(self, completion: str, example: Example) -> Grade:
        """The verdict on the text that a model gave for this example; never raises on any text."""

    def grade_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """`grade` of each pair, in order; tasks whose grading takes long do it in parallel."""
        return [self.grade(text, example) for text, example in zip(completions, examples, strict=True)]
