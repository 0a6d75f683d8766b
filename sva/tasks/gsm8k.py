"""GSM8K: school mathematics in words, answered by a number (Cobbe et al., arXiv 2110.14168)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading import amounts
from sva.tasks.reference import prompts, verdicts
from sva.tasks.sources import gsm8k_rows


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Task):
    """Rows 0, 2, 4, ... of upstream's train file train, the odd ones validate; upstream's test file tests.

    So does the public code of Transformer-Squared (SakanaAI/self-adaptive-llms, commit 03a41ae), and no question is
    in two of the three, so that both split policies are the same.
    """

    name: str = "gsm8k"
    label: str = "math"
    description: str = "a mathematical problem told in words"
    max_new_tokens: int = 512
    licence: str = gsm8k_rows.LICENCE
    origin: str = "github.com/openai/grade-school-math"

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks.sources import builders  # tensorflow-datasets takes half a second to import

        if split == "test":
            return builders.benchmark(self.name, "test")
        rows = builders.benchmark(self.name, "train")
        return rows[1::2] if split == "validation" else rows[::2]

    @property
    def system(self) -> str:
        return prompts.INSTRUCTION if self.prompt == "reference" else ""

    def text(self, example: Example) -> str:
        return example["question"]

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            return example["question"]
        return f'{example["question"]}\n\nSolve this step by step, then end with "The answer is" and the number.'

    def answer(self, example: Example) -> str:
        """Upstream's solution without its <<calculator notes>>, ending as the question asks for."""
        solution, _, number = re.sub(r"<<[^<>]*>>", "", example["answer"]).rpartition("####")
        return f"{solution.strip()}\nThe answer is {number.strip()}."

    def grade(self, completion: str, example: Example) -> Grade:
        if self.grader == "reference":
            value = verdicts.number(completion)
            right = value is not None and value == verdicts.gold_number(example["answer"])
            return Grade(right, None if value is None else f"{value:.15g}")
        answer = amounts.final_number(completion)
        return Grade(answer is not None and answer == gold(example), answer)


def gold(example: Example) -> str:
    """The right number, canonically spelled; stands after "####"."""
    number = amounts.final_number(example["answer"])
    assert number is not None, example
    return number
