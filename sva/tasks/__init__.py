"""What experts are trained for and measured on. Plain Python: nothing here imports JAX.

A new task is a frozen dataclass with a source of rows, the words of a question and a grader (`Task`), listed
in `_KNOWN`; or, with no code at all, a JSONL file.
"""

import difflib
import functools
from collections.abc import Callable, Sequence

from sva.errors import UserError
from sva.tasks import arc, gsm8k, procedural
from sva.tasks.base import SPLITS, Example, Grade, Task
from sva.tasks.code import CodeTask
from sva.tasks.humaneval import HumanEval
from sva.tasks.jsonl import from_jsonl
from sva.tasks.labels import OTHER
from sva.tasks.mbpp import Mbpp
from sva.tasks.routing import Routing, routing

__all__ = ["SPLITS", "Example", "Grade", "Routing", "Task", "from_jsonl", "names", "routing", "task"]

GRADERS = ("strict",)

_KNOWN: dict[str, Callable[[], Task]] = {
    **{name: lambda name=name: procedural.task(name) for name in procedural.NAMES},
    "gsm8k": gsm8k.Gsm8k,
    **{name: lambda name=name: arc.Arc(name=name) for name in arc.NAMES},
}
# Answered by programs: these have both graders, and a sandbox.
_CODE: dict[str, Callable[..., CodeTask]] = {
    "mbpp": Mbpp,
    "mbpp_0.1.0": functools.partial(Mbpp, name="mbpp_0.1.0", version="0.1.0"),
    "humaneval": HumanEval,
}


def names() -> tuple[str, ...]:
    """The tasks that `task` knows by name."""
    return (*_KNOWN, *_CODE, "routing")


def task(name: str, grader: str = "strict", routes: Sequence[str] = (), sandbox: str = "strict") -> Task:
    """The task of that name: one of `names()`, or the path of a user's .jsonl file (see `from_jsonl`).

    Args:
      sandbox: the level at which programs run, for tasks that are answered by programs (`sva.sandbox`).
      routes: for "routing" only: the tasks to tell apart; "other" is added where no task has that label.
    Raises:
      UserError: no such task (with the nearest names) or grader; a file that is no task; routes for another
        task than routing, or none for it.
    """
    if name in _CODE:
        return _CODE[name](grader=grader, sandbox=sandbox)
    if grader not in GRADERS:
        raise UserError(f"task {name}: no grader {grader!r}; there is {', '.join(GRADERS)}")
    if bool(routes) != (name == "routing"):
        raise UserError(f"task {name}: routes = {list(routes)}; the task routing needs some, no other takes any")
    if name == "routing":
        tasks = [task(route, grader) for route in routes]
        return routing(tasks if OTHER in {t.label for t in tasks} else [*tasks, task(OTHER, grader)])
    if name.endswith(".jsonl"):
        return from_jsonl(name)
    if name in _KNOWN:
        return _KNOWN[name]()
    near = difflib.get_close_matches(name, names(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"no task {name!r}; {hint}There are {', '.join(names())}, and paths of .jsonl files")
