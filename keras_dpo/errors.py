"""Errors that are the user's to mend, apart from faults of our own."""


class UserError(ValueError):
    """What was wrong, where, and what to do about it, in one line.

    Everything that this package refuses on purpose is raised as this class,
    so the command line can tell a mistake in its input (one line, exit status
    2) from a bug (a traceback, exit status 1).
    """


class UserTypeError(UserError, TypeError):
    """The same where the type is wrong."""
