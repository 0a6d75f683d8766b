"""`sva fetch`: a model's path on this machine, downloaded where it is missing."""

import dataclasses

from sva.cli.command_line import Command, argument
from sva.cli.options import MODEL, MODEL_HELP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Find or download a model and print where it is."""

    model: str = argument(MODEL_HELP, MODEL)


def run(arguments: Fetch) -> None:
    """Runs the command."""
    from sva.models.hub import resolve

    print(resolve(arguments.model))


COMMAND = Command("fetch", Fetch, run)
