"""Weights & Biases, for those who use it: the same rows as metrics.jsonl. Nothing of it is needed otherwise."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sva.utils.errors import UserError
from sva.utils.remote import name_of

Sink = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def wandb(project: str | None, run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Sink]:
    """A sink for each step's row: a run of this project, named after `run_dir`; without a project it drops them.

    A resumed run resumes the same one.

    Raises:
      UserError: the package is not installed, or refuses.
    """
    if not project:
        yield lambda row: None
        return
    try:
        import wandb as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"wandb={project}: the package wandb is not installed; install it, or leave out") from error
    try:
        run = package.init(
            project=project, name=run_dir.name, id=name_of(run_dir), resume="allow", config=dict(settings)
        )
    except Exception as error:  # its own errors have no common class
        said = str(error).split("\n")[0]
        raise UserError(f"wandb={project}: {said}; log in with `wandb login`, or set WANDB_MODE=offline") from error
    try:
        yield lambda row: run.log(dict(row), step=row["step"])
    finally:
        run.finish()
