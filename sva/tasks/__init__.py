"""Tasks that experts are trained for and measured on. Plain Python: nothing here imports JAX.

A new task is a frozen dataclass with a source of rows, the words of a question and a grader (`Task`), listed in
`_KNOWN` or in a small Python file of the user's (`python_file`); or, with no code at all, a JSONL file.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence

from sva.sandbox import LEVELS
from sva.tasks import arc, gsm8k, math_hendrycks, procedural, reasoning
from sva.tasks.base import SPLITS, Example, Grade, Task
from sva.tasks.code import CodeTask
from sva.tasks.humaneval import HumanEval
from sva.tasks.jsonl import from_jsonl
from sva.tasks.labels import OTHER
from sva.tasks.mbpp import Mbpp
from sva.tasks.python_file import from_python
from sva.tasks.reference import prompts, public_code
from sva.tasks.routing import Routing, routing
from sva.tasks.sources import arc_rows, kinds
from sva.tasks.splits import POLICIES
from sva.utils.errors import UserError

__all__ = ["SPLITS", "Example", "Grade", "Routing", "Task", "from_jsonl", "from_python", "names", "routing", "task"]

GRADERS = ("strict", "reference")
PROMPTS = ("own", "reference")

_KNOWN: dict[str, Callable[[], Task]] = {
    **{name: lambda name=name: procedural.task(name) for name in kinds.NAMES},
    "gsm8k": gsm8k.Gsm8k,
    "math": math_hendrycks.Math,
    **{name: lambda name=name: arc.Arc(name=name) for name in arc_rows.NAMES},
}
# Answered by programs, in a sandbox.
_CODE: dict[str, Callable[[], CodeTask]] = {
    "mbpp": Mbpp,
    "mbpp_0.1.0": functools.partial(Mbpp, name="mbpp_0.1.0", version="0.1.0"),
    "humaneval": HumanEval,
}


PUBLIC = ("gsm8k", "math", *arc_rows.NAMES, *_CODE)  # the public code's own


def names() -> tuple[str, ...]:
    """The tasks that `task` knows by name."""
    return (*_KNOWN, *_CODE, "routing")


def task(
    name: str,
    grader: str = "strict",
    routes: Sequence[str] = (),
    *,
    splits: str = "clean",
    prompt: str = "own",
    shots: int = 0,
    sandbox: str = "strict",
) -> Task:
    """The task of that name: one of `names()`, `reasoning_gym:NAME`, or the path of a user's .jsonl or .py file.

    Args:
      grader: "strict", sva's, or "reference", the verdicts of Transformer-Squared's public code, faults included, for
        the benchmarks that it has.
      routes: for "routing" only: the tasks to tell apart; "other" is added where no task has that label.
      splits: "clean" or "reference", see `sva.tasks.splits`.
      prompt: "own", or "reference": the public code's system message and question, its stop texts and its budget.
      shots: worked examples before the question, from the train split.
      sandbox: the level at which programs run, for tasks that are answered by programs (`sva.sandbox`).
    Raises:
      UserError: no such task (with the nearest names), grader, split policy or prompt; a file that is not a task;
        routes for another task than routing, or none for it.
    """
    for setting, value, known in (
        ("grader", grader, GRADERS),
        ("splits", splits, POLICIES),
        ("prompt", prompt, PROMPTS),
        ("sandbox", sandbox, LEVELS),
    ):
        if value not in known:
            raise UserError(f"task {name}: no {setting} {value!r}; there is {' and '.join(known)}")
    if bool(routes) != (name == "routing"):
        raise UserError(f"task {name}: routes = {list(routes)}; the task routing needs some, no other takes any")
    if shots < 0:
        raise UserError(f"task {name}: shots = {shots} must be at least 0")
    made = _made(name, routes, prompt)
    if made.name not in (*PUBLIC, "routing") and "reference" in (grader, splits, prompt):
        raise UserError(f"task {name}: the public code has no such task, so there is nothing to call reference")
    made = dataclasses.replace(made, grader=grader, splits=splits, prompt=prompt, shots=shots)
    if isinstance(made, CodeTask):
        made = dataclasses.replace(made, sandbox=sandbox)
    if prompt == "own":
        return made
    if shots:
        raise UserError(f"task {name}: shots = {shots}, but the public code shows no worked examples; use prompt=own")
    if isinstance(made, CodeTask):
        public_code.code_prompt()  # says at once where there is none
    if isinstance(made, Routing):
        public_code.classification_prompt()
    budget = max(prompts.MAX_NEW_TOKENS, made.max_new_tokens)
    return dataclasses.replace(made, stop=prompts.STOP, max_new_tokens=budget)


def _made(name: str, routes: Sequence[str], prompt: str) -> Task:
    if name == "routing" and prompt == "reference":  # there "other" is an answer and no task
        return dataclasses.replace(routing([task(route, prompt=prompt) for route in routes]), max_new_tokens=1024)
    if name == "routing":
        tasks = [task(route) for route in routes]
        return routing(tasks if OTHER in {t.label for t in tasks} else [*tasks, task(OTHER)])
    if name.endswith(".jsonl"):
        return from_jsonl(name)
    if name.endswith(".py"):
        return from_python(name)
    if name.startswith(reasoning.PREFIX):
        return reasoning.task(name)
    if name in _KNOWN:
        return _KNOWN[name]()
    if name in _CODE:
        return _CODE[name]()
    near = difflib.get_close_matches(name, names(), n=3)
    start = f"did you mean {' or '.join(near)}? There" if near else "there"
    known = f"{', '.join(names())}, {reasoning.PREFIX}NAME, and paths of .jsonl and .py files"
    raise UserError(f"no task {name!r}; {start} are {known}")
