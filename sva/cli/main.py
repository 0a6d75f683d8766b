"""The `sva` command. Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else.

Nothing that this module imports imports JAX: help and mistakes of the command line are answered at once.
"""

import argparse
import sys
from collections.abc import Sequence

from sva.cli import (
    adapt,
    bench,
    decompose,
    demo,
    evaluate,
    expert,
    fetch,
    generate,
    report,
    sweep,
    train,
)
from sva.cli import compile as compile_command
from sva.utils.errors import UserError

_COMMANDS = (demo, fetch, decompose, train, compile_command, adapt, evaluate, generate, report, bench, sweep, expert)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"sva: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # training met a value that is not finite, or an alarm
        print(f"sva: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "jax" in sys.modules:
            from sva.parallel import processes

            if processes.is_loss(error):
                processes.lost(error)
        raise
    except KeyboardInterrupt:
        print("\nsva: interrupted; run the same command to resume from what is finished", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line of all commands."""
    top = argparse.ArgumentParser(
        prog="sva", description="Train, mix and serve singular-value experts for language models."
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
