"""Exceptions for user errors, distinct from bugs in this package."""


class UserError(ValueError):
    """A user error: what is wrong, where, and how to fix it, in one line.

    Invalid input is raised as this class, so the command line can tell it (one
    line, exit status 2) from a bug (a traceback, exit status 1). Losses raise
    `ValueError`, guards `FloatingPointError`, and failed writes `OSError`.
    """


class UserTypeError(UserError, TypeError):
    """A `UserError` for an argument of the wrong type."""
