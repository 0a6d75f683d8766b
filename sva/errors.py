"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake outside sva: bad input, a missing file, a full disk.

    The message is one line that names what was wrong, where, and how to mend it. The command line prints it
    without a traceback and exits with status 2.
    """


def at_least(name: str, value: float, bound: float) -> None:
    """Raises UserError unless the setting `name` is `bound` or more."""
    if not value >= bound:
        raise UserError(f"{name}={value} must be at least {bound}")


def above(name: str, value: float, bound: float) -> None:
    """Raises UserError unless the setting `name` is more than `bound`."""
    if not value > bound:
        raise UserError(f"{name}={value} must be above {bound}")
