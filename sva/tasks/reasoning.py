"""Any environment of reasoning-gym (arXiv 2505.24760) as a task, `reasoning_gym:NAME`; needs the extra `reasoning`.

What is known of it and heeded here: question i is drawn with Random(seed + i), so that neighbouring seeds overlap (one
seed, then, and splits by the question's words); questions repeat (each is kept once); a score below 1 is a partial one
and counts as wrong; the answers of `syllogism` are wrong (it is refused); some scorers evaluate text (a worker process,
and only plain text is handed on).
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading.reasoning_worker import environment, is_plain
from sva.tasks.grading.worker import shared
from sva.tasks.grading.wrappings import unwrapped
from sva.tasks.jsonl import split_of
from sva.utils.errors import UserError

PREFIX = "reasoning_gym:"
SIZE = 2_000  # questions drawn, of which about 80 % train


@lru_cache(maxsize=4)
def _questions(name: str, seed: int) -> tuple[Example, ...]:
    found: dict[str, Example] = {}
    for index, entry in enumerate(_environment(name, seed)):
        row = {"question": entry["question"], "answer": str(entry["answer"]), "index": index}
        found.setdefault(entry["question"], row)
    return tuple(found.values())


def _environment(name: str, seed: int) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"task {PREFIX}{name} needs reasoning-gym: pip install 'sva[reasoning]'")
    if name == "syllogism":
        raise UserError(f"task {PREFIX}{name}: reasoning-gym's answers to it are wrong; choose another environment")
    try:
        return environment(name, seed, SIZE)
    except ValueError as error:
        raise UserError(f"task {PREFIX}{name}: {error}; reasoning_gym.factory.DATASETS has the names") from error


@dataclass(frozen=True, kw_only=True)
class Reasoning(Task):
    """One environment; splits are decided by the words of a question (`sva.tasks.jsonl.split_of`)."""

    environment: str
    seed: int = 0

    def _rows(self, split: str) -> Sequence[Example]:
        return [row for row in _questions(self.environment, self.seed) if split_of(row["question"]) == split]

    def question(self, example: Example) -> str:
        return f'{example["question"]}\n\nThink step by step, then end with "Answer:" and the answer alone.'

    def text(self, example: Example) -> str:
        return example["question"]

    def answer(self, example: Example) -> str:
        return f"Answer: {example['answer']}"

    def grade(self, completion: str, example: Example) -> Grade:
        """Right if the environment's own scorer gives exactly 1."""
        answer = final_answer(completion)
        if answer is None or answer == example["answer"].strip():
            return Grade(answer is not None, answer)
        if not is_plain(answer):
            return Grade(False, answer, "unreadable: more than an expression")
        place = {"name": self.environment, "seed": self.seed, "size": SIZE, "index": example["index"]}
        return Grade(*_given(shared("reasoning_worker.py").ask({**place, "answer": answer}), answer))


def _given(verdict: Any, answer: str) -> tuple[bool, str, str]:
    return verdict.equal, answer, verdict.note


def final_answer(completion: str) -> str | None:
    """The text after the last "Answer:", else in the tags or outside the thinking, else a completion of one line."""
    text = unwrapped(completion)[-20_000:].strip()
    _, said, rest = re.sub(r"\*\*", "", text).rpartition("Answer:")
    answer = rest.strip() if said or "\n" not in text or text != completion.strip() else ""
    return answer.removesuffix(".") or None


def task(name: str) -> Reasoning:
    """The task `reasoning_gym:NAME`.

    Raises:
      UserError: reasoning-gym is not installed, has no such environment, or has it with wrong answers.
    """
    inner = name.removeprefix(PREFIX)
    _environment(inner, 0)
    return Reasoning(
        name=name,
        label="reasoning",
        description=inner.replace("_", " "),
        max_new_tokens=512,
        licence="Apache-2.0",
        origin="github.com/open-thought/reasoning-gym",
        environment=inner,
    )
