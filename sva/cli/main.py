"""The `sva` command. Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else.

Nothing that this module imports imports JAX: help and mistakes of the command line are answered at once.
"""

import os
import select
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
    lm_eval,
    report,
    serve,
    sweep,
    train,
    upcycle,
    verify,
)
from sva.cli import command_line as line
from sva.cli import compile as compile_command
from sva.cli.command_line import Command
from sva.cli.options import completed
from sva.utils.errors import TransientError, UserError

_MODULES = (
    demo,
    fetch,
    decompose,
    train,
    upcycle,
    compile_command,
    adapt,
    evaluate,
    generate,
    serve,
    report,
    bench,
    sweep,
    expert,
    verify,
    lm_eval,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    A command whose reader has gone (`sva sweep FILE --dry-run | head -1`) ends there, without a word.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1


def _run(argv: Sequence[str] | None) -> int:
    """`main`, whatever becomes of the output."""
    try:
        command, options = parse(argv)
        return command.run(completed(options)) or 0
    except UserError as error:
        print(f"sva: {error}", file=sys.stderr)
        return 2
    except (TransientError, FloatingPointError) as error:  # the latter: a value that is not finite, or an alarm
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


def parse(argv: Sequence[str] | None = None) -> tuple[Command, Any]:
    """(command, its options) of a command line; raises SystemExit as `command_line.parse` does."""
    about = "Train, mix and serve singular-value experts for language models."
    return line.parse(line.parser([module.COMMAND for module in _MODULES], prog="sva", description=about), argv)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; it then leads nowhere, so that Python's exit is quiet."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
