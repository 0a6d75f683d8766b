"""Tasks that are answered by a program, which runs against tests in the sandbox."""

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sva.sandbox import LEVELS, Job, Limits, Sandbox, Verdict
from sva.tasks.base import Example, Grade, Task
from sva.tasks.grading import oracles
from sva.tasks.grading.programs import extract
from sva.tasks.reference import programs, public_code
from sva.utils.errors import UserError

GRADERS = ("strict", "reference")
LIMITS = Limits(cpu_secs=60, wall_secs=900.0, memory_bytes=4 << 30)
"""For a program and for its tests, which run the reference: evalplus' memory, and time for the slowest references. What
ends a slow program sooner is the limit of each call."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of k samples, drawn from these without putting back, is correct.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374, equation 1).

    Raises:
      ValueError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def comparison(name: str, reference: str, inputs: Sequence[Any], atol: float) -> tuple[str, dict[str, Any]]:
    """Tests and their data (see `sva.sandbox.Job`): the program must answer each input as the reference does."""
    data = {"name": name, "reference": reference, "inputs": list(inputs), "atol": atol}
    return inspect.getsource(oracles) + "\ncompare(call_within, data)\n", data


@functools.cache
def shared_sandbox(level: str) -> Sandbox:
    """This process's sandbox of that level; its workers start with the first use and end with the process."""
    return Sandbox(level)


@dataclass(frozen=True, kw_only=True)
class CodeTask(Task):
    """Programs against tests; an example has `prompt` and `entry_point`, the name of the function.

    `grader`: "strict" runs base and plus tests, the latter with reasons that begin with "plus tests"; "reference" makes
    the program as the public code does and runs base tests only, which is what its rewards and tables are made of.
    `prompt`: "reference" asks in the public code's template, read from the user's copy (`sva.tasks.reference.
    public_code`), behind which the answer's first words are given. `sandbox` is the level, one of `sva.sandbox.LEVELS`.
    """

    label: str = "code"
    description: str = "a request to write a program"
    max_new_tokens: int = 512
    grader: str = "strict"
    sandbox: str = "strict"
    is_continued: bool = False  # whether `prompt` is the beginning of the program

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise UserError(f"task {self.name}: no grader {self.grader!r}; there are {' and '.join(GRADERS)}")
        if self.sandbox not in LEVELS:
            raise UserError(f"task {self.name}: sandbox={self.sandbox!r}; there are {' and '.join(LEVELS)}")

    @abstractmethod
    def tests(self, example: Example) -> list[tuple[str, Any]]:
        """Base tests and, where there are any, plus tests: source and data."""

    @abstractmethod
    def prefill(self, example: Example) -> str:
        """The first words of the answer that the public code gives the model."""

    @property
    def is_solved(self) -> bool:
        return True

    def framed(self, example: Example) -> str | None:
        """The public code's template around the question, and the answer's first words right behind it."""
        if self.prompt != "reference":
            return None
        return public_code.filled(public_code.code_prompt(), self.turns(example)) + self.prefill(example)

    def answer(self, example: Example) -> str:
        """A right completion, for worked examples; under prompt=reference what follows its first words."""
        solution = example["canonical_solution"].rstrip()
        if self.grader == "reference" and not self.is_continued:
            solution = programs.by_four(solution)
        if self.prompt == "reference":
            return (solution if self.is_continued else "\n" + solution.lstrip()) + "\n```"
        before = example["prompt"] if self.is_continued else ""
        return f"```python\n{(before + solution).strip()}\n```"

    def program(self, completion: str, example: Example) -> str | None:
        """The program to run; None where there is none."""
        name, prompt = example["entry_point"], example["prompt"]
        if self.grader == "reference":
            body = programs.body(completion, is_open=self.prompt == "reference")
            return prompt + body if self.is_continued else programs.sanitised(f"{prompt}\n{body}", name)
        return extract(completion, name, prompt if self.is_continued else "")

    def grade(self, completion: str, example: Example) -> Grade:
        return self.grade_many([completion], [example])[0]

    def grade_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """Verdicts from the sandbox's workers in parallel; the answer is the program.

        Raises:
          UserError: the sandbox's level cannot be had here.
        """
        programs = [self.program(text, example) for text, example in zip(completions, examples, strict=True)]
        verdicts = self.verdicts(programs, examples)
        return [Grade(v.passed, p, v.reason) for p, v in zip(programs, verdicts, strict=True)]

    def verdicts(self, programs: Sequence[str | None], examples: Sequence[Example]) -> list[Verdict]:
        """The sandbox's verdict on each program: base tests, then plus tests where those pass."""
        missing = [Verdict(False, f"no program that defines {example['entry_point']}", 0.0) for example in examples]
        found = [i for i, program in enumerate(programs) if program is not None]
        verdicts = dict(enumerate(missing))
        num_rounds = 1 if self.grader == "reference" else 2
        for number, prefix in enumerate(["", "plus tests: "][:num_rounds]):
            tests = {i: self.tests(examples[i])[number : number + 1] for i in found}
            jobs = {i: Job(programs[i] or "", *test[0]) for i, test in tests.items() if test}
            ran = shared_sandbox(self.sandbox).run(list(jobs.values()), LIMITS) if jobs else []
            for i, verdict in zip(jobs, ran, strict=True):
                verdicts[i] = verdict if verdict.passed else verdict._replace(reason=prefix + verdict.reason)
            found = [i for i in found if verdicts[i].passed]
        return [verdicts[i] for i in range(len(programs))]
