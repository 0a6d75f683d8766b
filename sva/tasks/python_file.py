"""A user's own task in one small Python file, run when it is named.

# colours.py
from dataclasses import dataclass
from sva.tasks import Grade, Task

@dataclass(frozen=True, kw_only=True)
class Colours(Task):
    def _rows(self, split): ...
    def question(self, example): ...
    def grade(self, completion, example): ...

TASK = Colours(name="colours", label="colours", description="...", max_new_tokens=8, licence="...", origin="...")
"""

import importlib.util
import sys
from pathlib import Path

from sva.tasks.base import Task
from sva.utils.errors import UserError
from sva.utils.remote import local_path


def from_python(path: str | Path) -> Task:
    """The `TASK` that a Python file defines.

    Raises:
      UserError: no such file, it stops with an error (named, with its line), or it defines no `TASK`.
    """
    path = local_path(path, "a task's file")
    if not path.is_file():
        raise UserError(f"task file {path} does not exist")
    name = f"sva_user_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        trace, line = error.__traceback__, getattr(error, "lineno", None)
        while trace:
            is_here = Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve()
            line = trace.tb_lineno if is_here else line
            trace = trace.tb_next
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        what = "has none" if task is None else f"has one of type {type(task).__name__}"
        raise UserError(f"{path} must define TASK, a sva.tasks.Task such as TASK = MyTask(name=...); it {what}")
    return task
