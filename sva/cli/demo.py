"""`sva demo`: the whole method on one small model."""

import dataclasses
from pathlib import Path

from sva.cli.command_line import Command, option
from sva.cli.options import start_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Train one expert live, load others, answer a mixed set in two passes."""

    dir: Path = option("where results go (default: %(default)s)", Path("runs/demo"))


def run(arguments: Demo) -> None:
    """Runs the command."""
    start_jax()
    from sva.cli.demonstration import demo

    demo(arguments.dir)


COMMAND = Command("demo", Demo, run)
