"""The exceptions that are one line for the user: "mend this", and "try again"."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake outside sva: bad input, a missing file, a full disk.

    The message is one line that names what was wrong, where, and how to mend it. The command line prints it
    without a traceback and exits with status 2.
    """


class TransientError(RuntimeError):
    """A fault outside sva that the same command may not meet again: a host that is late, a bucket that is gone.

    The message is one line. The command line prints it without a traceback and exits with status 1, so that a launcher
    starts the command again.
    """


def at_least(name: str, value: float, bound: float) -> None:
    """Raises UserError unless the setting `name` is `bound` or more."""
    if not value >= bound:
        raise UserError(f"{name}={value} must be at least {bound}")


def above(name: str, value: float, bound: float) -> None:
    """Raises UserError unless the setting `name` is more than `bound`."""
    if not value > bound:
        raise UserError(f"{name}={value} must be above {bound}")


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The settings that are others in `there` than those asked for, in words; nothing where all are the same."""
    return "; ".join(
        f"{name}: {there.get(name)} there, {asked.get(name)} asked for"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    )
