"""MATH: competition mathematics, answered by an expression (Hendrycks et al., arXiv 2103.03874)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sva.tasks import splits
from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading import math_answers
from sva.tasks.grading.worker import Verdict, shared
from sva.tasks.reference import verdicts
from sva.tasks.sources import math_rows

_LONGEST = 1_000  # characters of an answer; the longest right one of MATH has 159


@lru_cache(maxsize=4)
def _clean(split: str, fingerprint: str) -> tuple[int, ...]:
    """The rows of upstream's train part that make up train or validation, of the files with that fingerprint."""
    from sva.tasks.sources import builders

    train, test = ([row["problem"] for row in builders.math(part)] for part in ("train", "test"))
    validation = [i for i in splits.apart(train, test) if i % 10 == 9]
    if split == "validation":
        return tuple(validation)
    later = [*test, *(train[i] for i in validation)]
    return tuple(i for i in splits.apart(train, later) if i % 10 != 9)


@dataclass(frozen=True, kw_only=True)
class Math(Task):
    """Every tenth problem of upstream's train part validates, the others train; upstream's test part tests.

    Problems that occur again in a later part are left out. Under reference splits the test part is all there is: the
    public code only tests on MATH.
    """

    name: str = "math"
    label: str = "math"
    description: str = "a mathematical problem"
    max_new_tokens: int = 1024
    licence: str = math_rows.LICENCE
    origin: str = "github.com/hendrycks/math"

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks.sources import builders  # tensorflow-datasets takes half a second to import

        if split == "test" or self.splits == "reference":
            return builders.math("test")
        return builders.Rows(builders.math("train"), _clean(split, math_rows.fingerprint()))

    @property
    def system(self) -> str:
        if self.prompt != "reference":
            return ""
        return "Solve the question below by reasoning step by step,and put the final answer within \\boxed{}."

    def text(self, example: Example) -> str:
        return example["problem"]

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            return example["problem"]
        return f"{example['problem']}\n\nSolve this step by step and put the final answer in \\boxed{{}}."

    @property
    def is_solved(self) -> bool:
        return True

    def answer(self, example: Example) -> str:
        return example["solution"]

    def grade(self, completion: str, example: Example) -> Grade:
        if self.grader == "reference":
            return reference(completion, verdicts.boxed(example["solution"]))
        return strict(completion, gold(example))


def gold(example: Example) -> str:
    """The right answer: what the last box of the solution holds."""
    found = math_answers.boxed(example["solution"])
    assert found is not None, example
    return found


def compare(policy: str, gold: str, answer: str) -> Verdict:
    """Whether two answers, LaTeX without the dollars around it or plain text, are equal under that policy."""
    if len(answer) > _LONGEST:
        return Verdict(False, "unreadable: too long")
    return shared("math_worker.py").ask({"policy": policy, "gold": gold, "answer": answer})


def strict(completion: str, gold: str) -> Grade:
    """Right if the completion's final answer equals `gold` in value, whatever its spelling; words word for word."""
    answer = math_answers.final_answer(completion)
    if answer is None:
        return Grade(False, None)
    right = math_answers.tidy(gold) or gold
    if answer == right or math_answers.same_words(answer, right):
        return Grade(True, answer)
    if math_answers.is_wording(gold):
        return Grade(False, answer)
    equal, note = compare("strict", right, answer)
    return Grade(equal, answer, note)


def reference(completion: str, gold: str | None) -> Grade:
    """The public code's verdict (`sva.tasks.reference.verdicts`); of two that are None it is "right"."""
    answer = verdicts.solution_answer(completion)
    if answer is None or gold is None:
        both = answer is None and gold is None
        return Grade(both, answer, "right without an answer" if both else "")
    equal, note = compare("reference", gold, answer)
    return Grade(equal, answer, note)
