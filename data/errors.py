"""The one exception whose text is meant for the person at the terminal."""

from __future__ import annotations


class ColdstillError(Exception):
    """A mistake or a fault that the user can act on.

    The text is one line: *where: what is wrong, the value, what was expected; what to do*.
    The command line prints it without a traceback and exits with status 1.
    """


class DamageError(ColdstillError):
    """Something of a store is not what was written, whoever reads it and whenever.

    Only this lets a repair delete a shard: a network that fails is no damage.
    """


class DivergedError(ColdstillError):
    """A training came to a loss or a gradient that is no number: its own settings are at fault, so
    that others may go on."""


class StoppedError(BaseException):
    """Asked to stop. Like Ctrl-C, not to be taken for something that failed."""
