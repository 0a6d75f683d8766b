"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake outside sva: bad input, a missing file, a full disk.

    The message is one line that names what was wrong, where, and how to mend it. The command line prints it
    without a traceback and exits with status 2.
    """
