"""The protocol of a task: rows to ask about, the words of the question, and a verdict on an answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sva.utils.errors import UserError

Example = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class Grade(NamedTuple):
    """Whether a completion is right, and the answer that was found in it (None: no single answer was).

    `reason` says what the other two cannot: that an answer was found and could not be compared, and why.
    """

    correct: bool
    answer: str | None
    reason: str = ""


def reason(grade: Grade) -> str:
    """Why a verdict is what it is, in a few words to count by: its own reason, else right, wrong or no answer."""
    return grade.reason or ("right" if grade.correct else "no answer" if grade.answer is None else "wrong")


class Options(NamedTuple):
    """A question whose options can be scored by their likelihood."""

    prompt: str
    texts: tuple[str, ...]  # what follows the prompt, of each option
    labels: tuple[str, ...]
    right: int  # the place of the right one


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A named set of examples with a grader; frozen and hashable.

    An example is a plain dict with the field names of wherever it comes from. `label` is the lower-case word
    that a dispatcher answers with for this kind of question, `description` the phrase that explains it; tasks
    may share a label. `max_new_tokens` is what a right answer needs, with some room. `grader`,
    `splits` and `prompt` choose between sva's way and that of Transformer-Squared's public code ("reference"), each by
    itself.
    """

    name: str
    label: str
    description: str
    max_new_tokens: int
    licence: str
    origin: str
    stop: tuple[str, ...] = ()  # texts that end an answer; what follows one is cut off
    shots: int = 0  # worked examples from the train split before the question
    grader: str = "strict"
    splits: str = "clean"
    prompt: str = "own"

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

    def text(self, example: Example) -> str:
        """The text that identifies an example, for the check that splits do not overlap."""
        return self.question(example)

    def answer(self, example: Example) -> str:
        """A right completion, for worked examples."""
        return str(example["answer"])

    @property
    def is_solved(self) -> bool:
        """Whether `answer` is upstream's own solution, of which next-token prediction learns."""
        return False

    def turns(self, example: Example) -> list[dict[str, str]]:
        """The chat up to the model's answer: a system message where the task has one, worked examples, the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        shown = [
            turn
            for row in self._shown(example)
            for turn in (
                {"role": "user", "content": self.question(row)},
                {"role": "assistant", "content": self.answer(row)},
            )
        ]
        return [*system, *shown, {"role": "user", "content": self.question(example)}]

    def _shown(self, example: Example) -> Sequence[Example]:
        """The first rows of the train split, as many as `shots`, without the example itself."""
        if not self.shots:
            return ()
        rows = self.source("train")[: self.shots + 1]
        others = [row for row in rows if self.text(row) != self.text(example)][: self.shots]
        if len(others) < self.shots:
            raise UserError(f"task {self.name}: shots={self.shots}, but train has {len(others)} other rows")
        return others

    @property
    def system(self) -> str:
        """The system message; none ("") unless the prompt is the public code's."""
        return ""

    def opening(self, architecture: str) -> str:
        """The first words of the model's answer, given to it, for models of that architecture."""
        return ""

    def framed(self, example: Example) -> str | None:
        """The whole prompt with the answer's first words, where no chat template goes around it; else None."""
        del example
        return None

    def options(self, example: Example) -> Options:
        """The options to score by likelihood.

        Raises:
          UserError: the task has no options.
        """
        raise UserError(f"task {self.name} has no options to score; leave out --by likelihood")

    @abstractmethod
    def grade(self, completion: str, example: Example) -> Grade:
        """The verdict on the text that a model gave for this example; never raises on any text."""

    def grade_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """`grade` of each pair, in order; tasks whose grading takes long do it in parallel."""
        return [self.grade(text, example) for text, example in zip(completions, examples, strict=True)]
