"""`sva demo`: the whole method on one small model."""

import argparse
from pathlib import Path
from typing import Any

from sva.cli.options import add_command, start_jax
from sva.utils.remote import local_argument


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Train one expert live, load others, answer a mixed set in two passes."
    parser = add_command(commands, "demo", run, text)
    parser.add_argument(
        "--dir", type=local_argument, default=Path("runs/demo"), help="where results go (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    start_jax()
    from sva.cli.demonstration import demo

    demo(arguments.dir)
