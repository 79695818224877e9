"""Which processes may write a store: one alone, or several that share its shards.

A process that writes alone locks the store, then looks for other writers. A process that joins
others locks the name for joining, then looks at the store's lock. So of two processes that start at
the same time at least one sees the other.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Protocol

from ..errors import ColdstillError, DamageError
from ..store.layout import CLAIMS, LOCK, MEMBERS, STARTING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class HeldError(ColdstillError):
    """Another process has locked the name."""


class Locks(Protocol):
    """Locks on names of one store: lock files of the system, or leases in an object store."""

    def hold(self, name: str, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Hold the lock `name`; raises HeldError if another process has it.

        wait  wait for the other process first
        """
        ...

    def expect_free(self, name: str) -> None:
        """Raise HeldError if a living process holds the lock `name`."""
        ...

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder of the store."""
        ...

    def remove(self, name: str) -> None:
        """Delete a lock that no living process holds; no error if it is missing."""
        ...


class Writers:
    """The part of a `Place` that decides who may write."""

    def __init__(self, locks: Locks) -> None:
        """Use these locks; nothing is locked yet."""
        self._locks = locks

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer, as `Place` describes."""
        # Look first without the lock: a refused process should not hinder others with it.
        self._expect_no_other()
        with self._locks.hold(LOCK):
            self._expect_no_other()
            yield

    @contextlib.contextmanager
    def join(self, begin: Callable[[bool], None]) -> Iterator[None]:
        """Be one of several writers, as `Place` describes."""
        with contextlib.ExitStack() as membership:
            with self._locks.hold(STARTING, wait=True):
                self._locks.expect_free(LOCK)
                # Its holder may only be paused: without its lock it cannot continue.
                self._locks.remove(LOCK)
                alone = True
                try:
                    self._expect_no_member()
                except HeldError:
                    alone = False
                # Become a member before STARTING is released, so that others always see one of
                # both.
                membership.enter_context(self._locks.hold(f"{MEMBERS}{secrets.token_hex(8)}"))
                begin(alone)
            yield

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Reserve a piece of work, as `Place` describes."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._locks.hold(name))
            except HeldError:
                yield False
                return
            yield True

    def clear_claims(self) -> None:
        """Delete the claims of dead writers and those copied from elsewhere. Only for a process
        that is the only writer."""
        for path in self._claims():
            with contextlib.suppress(DamageError):
                try:
                    self._locks.expect_free(path)
                except HeldError:
                    continue
            self._locks.remove(path)

    def _expect_no_other(self) -> None:
        # In this order: a process that stops joining in between is a member by then.
        self._locks.expect_free(STARTING)
        self._expect_no_member()

    def _expect_no_member(self) -> None:
        """Raise HeldError if a member is alive; delete what dead ones left."""
        for path in self._claims():
            if path.startswith(MEMBERS):
                self._locks.expect_free(path)
                self._locks.remove(path)

    def _claims(self) -> list[str]:
        return [f"{CLAIMS}/{name}" for name in sorted(self._locks.names(CLAIMS))]
