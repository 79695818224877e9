"""Errors whose text is shown to the user."""

from __future__ import annotations


class ColdstillError(Exception):
    """An error that the user can act on.

    The text is one line: *where: what is wrong, the value, what was expected; what to do*.
    The command line prints it without a traceback and exits with status 1.
    """


class DamageError(ColdstillError):
    """A part of a store is not what was written.

    A repair deletes a shard only because of this error: a network error is not damage.
    """


class DivergedError(ColdstillError):
    """A training reached a NaN or infinite loss or gradient, because of its settings. Other
    trainings may continue."""


class StoppedError(BaseException):
    """The user asked to stop, as with Ctrl-C; not a failure."""
