"""The `sva` command. Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else.

Nothing that this module imports imports JAX: help and mistakes of the command line are answered at once.
"""

import sys
from collections.abc import Sequence
from typing import Any

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
from sva.cli import command_line as line
from sva.cli import compile as compile_command
from sva.cli.command_line import Command
from sva.utils.errors import UserError

_MODULES = (demo, fetch, decompose, train, compile_command, adapt, evaluate, generate, report, bench, sweep, expert)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        command, options = parse(argv)
        command.run(options)
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


def parse(argv: Sequence[str] | None = None) -> tuple[Command, Any]:
    """(command, its options) of a command line; raises SystemExit as `command_line.parse` does."""
    about = "Train, mix and serve singular-value experts for language models."
    return line.parse(line.parser([module.COMMAND for module in _MODULES], prog="sva", description=about), argv)


if __name__ == "__main__":
    sys.exit(main())
