"""What experts are trained for and measured on. Plain Python: nothing here imports JAX."""

import difflib

from sva.errors import UserError
from sva.tasks import procedural
from sva.tasks.base import Example, Grade, Task

__all__ = ["Example", "Grade", "Task", "names", "task"]


def names() -> tuple[str, ...]:
    """The tasks that `task` knows by name."""
    return procedural.NAMES


def task(name: str, grader: str = "strict") -> Task:
    """The task of that name.

    Raises:
      UserError: no such task (with the nearest names), or no such grader.
    """
    if grader != "strict":
        raise UserError(f"grader {grader!r}: only 'strict' exists")
    if name in procedural.NAMES:
        return procedural.task(name)
    near = difflib.get_close_matches(name, names(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"task {name!r} does not exist; {hint}known: {', '.join(names())}")
