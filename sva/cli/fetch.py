"""`sva fetch`: a model's path on this machine, downloaded where it is missing."""

import argparse
from typing import Any

from sva.cli.options import add_command, add_model


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "fetch", run, "Find or download a model and print where it is.")
    add_model(parser, name="model")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from sva.models.hub import resolve

    print(resolve(arguments.model))
