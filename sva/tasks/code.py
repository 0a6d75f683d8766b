"""Tasks that are answered by a program: finding it in a completion, and running it against tests in the sandbox."""

import ast
import functools
import inspect
import math
import re
import textwrap
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sva.errors import UserError
from sva.sandbox import LEVELS, Job, Limits, Sandbox, Verdict
from sva.tasks import oracles
from sva.tasks.base import Example, Grade, Task
from sva.tasks.wrappings import unwrapped

GRADERS = ("strict", "reference")
LIMITS = Limits(cpu_secs=60, wall_secs=900.0, memory_bytes=4 << 30)
"""For a program and for its tests, which run the reference: evalplus' memory, and time for the slowest references. What
ends a slow program sooner is the limit of each call."""
_LONGEST = 100_000  # characters at the end of a completion that are looked at
_MOST_TRIES = 10  # at blocks, at beginnings of code, at lines to cut
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.DOTALL | re.MULTILINE)
_CODE_BEGINS = re.compile(r"^(?:def |class |import |from |@|async def )", re.MULTILINE)
_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of k samples, drawn from these without putting back, is correct.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374, equation 1).

    Raises:
      ValueError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _parse(source: str) -> ast.Module | int:
    """The syntax tree, or the number of the line where it is not Python. Nothing is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the program's own making, such as "\d"
        try:
            return ast.parse(source)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return 1


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _definitions(source: str, name: str) -> str | None:
    """The imports, definitions and assignments of a program that defines `name`; None where it does not.

    What a module does besides (prints, asserts and inputs that show how to use it) is left out.
    """
    tree = _parse(source)
    if isinstance(tree, int) or not any(name in _names(statement) for statement in tree.body):
        return None
    lines = source.split("\n")
    kept: list[int] = []
    for statement in tree.body:
        if isinstance(statement, _KEPT):
            decorators = getattr(statement, "decorator_list", [])
            first = min(part.lineno for part in (statement, *decorators))
            kept += range(first - 1, statement.end_lineno or first)
    return "\n".join(lines[number] for number in dict.fromkeys(kept)) + "\n"


def _code_at(text: str) -> str:
    """The lines from the beginning of `text` up to where it stops being Python."""
    lines = text.split("\n")
    for _ in range(_MOST_TRIES):
        bad = _parse("\n".join(lines))
        if not isinstance(bad, int) or not lines:
            break
        lines = lines[: min(bad, len(lines)) - 1]
    return "\n".join(lines)


def _candidates(text: str) -> Iterator[str]:
    """Stretches of a completion that may be the program, best first: the last block of code, code among words."""
    blocks = [match for match in _FENCE.finditer(text) if match[1].lower() in ("", "python", "python3", "py")]
    yield from (match[2] for match in reversed(blocks[-_MOST_TRIES:]))
    beginnings = [match.start() for match in _CODE_BEGINS.finditer(text)]
    yield from (_code_at(text[start:]) for start in beginnings[:_MOST_TRIES])


def extract(completion: str, name: str, prompt: str = "") -> str | None:
    """The program in a completion that defines the function `name`; None where there is none.

    The last block of code that defines it, else code that stands among words, else, where `prompt` is the beginning of
    a program, its continuation. What `prompt` imports and defines before `name` comes first.
    """
    text = unwrapped(completion)[-_LONGEST:].replace("\r\n", "\n").replace("\r", "\n")
    preamble = prompt[: found.start()] if (found := re.search(rf"^def {name}\b", prompt, re.MULTILINE)) else ""
    for candidate in _candidates(text):
        program = _definitions(textwrap.dedent(candidate), name)
        if program is not None:
            return preamble + program
    if prompt and (body := _continuation(text)):
        return _definitions(_code_at(prompt + body), name)
    return None


def _continuation(text: str) -> str:
    """The indented lines that a completion begins with."""
    lines = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith((" ", "\t")):
            break
        lines.append(line)
    return "\n".join(lines)


def reference_program(completion: str, name: str, prompt: str) -> str:
    """The program that the public code of Transformer-Squared makes of a completion, its faults included.

    SakanaAI/self-adaptive-llms at 03a41ae, evaluation/fishfarm/fishfarm/tasks/evalplus: what was generated before a
    closing fence, behind the prompt, cut by lines. Functions count only if they have a "return" indented by four. There
    the prompt ends in an opening fence; here, where the model writes one, what comes before it is dropped.
    """
    opened = re.search(r"```[^\n]*\n", completion)
    body = completion[opened.end() if opened else 0 :].partition("```")[0]
    first, *pieces = re.split(rf"def {re.escape(name)}\s*\(", "\n" + f"{prompt}\n{body}".strip())
    bodies = [piece for piece in pieces if "    return " in piece.split("\ndef")[0]]
    head = f"def {name}("
    lines = (head + head.join(bodies)).splitlines() if bodies else []
    kept = []
    for number, line in enumerate(" " + line if len(line) - len(line.lstrip()) == 3 else line for line in lines):
        is_flush = bool(line.strip()) and not line.startswith((" ", "\t", "def ", "import ", "from "))
        if number and is_flush and line.startswith(('"""', "if", "print")):
            break
        if not number or not is_flush:
            kept.append(line)
    parts = (first + "\n".join(kept)).split("\ndef ")
    own = (f"{name} ", f"{name}(")
    parts[1:] = [p for p in parts[1:] if p.strip().startswith(own) or not isinstance(_parse("\ndef " + p), int)]
    return "\ndef ".join(parts).strip()


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
    `sandbox` is the level, one of `sva.sandbox.LEVELS`.
    """

    label: str = "code"
    description: str = "a request to write a program"
    max_new_tokens: int = 512
    metric: str = "pass@1"
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

    def answer(self, example: Example) -> str:
        """A right completion, for worked examples."""
        before = example["prompt"] if self.is_continued else ""
        return f"```python\n{(before + example['canonical_solution']).strip()}\n```"

    def program(self, completion: str, example: Example) -> str | None:
        """What is run; None where there is nothing to run."""
        name, prompt = example["entry_point"], example["prompt"]
        if self.grader == "reference":
            return reference_program(completion, name, prompt)
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
