"""All that one process holds of a distant store: the whole of it, or pieces of shared work.

Whoever writes alone takes the lock, then looks for others; whoever writes with others announces
itself as the one that is joining, then looks at the lock. So of two who come at the same time at
least one sees the other.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING

from ..errors import DamageError
from ..store.layout import CLAIMS, LOCK, MEMBERS, STARTING
from .lease import DEAD, RENEW, HeldError, Lease, holder_of, living_holder, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .lease import Holder
    from .objects import Objects

_PATIENCE = DEAD + 2 * RENEW
"""Seconds to wait for another writer that is just joining: a dead one is known as such by then."""
_PAUSE = 0.5
"""Seconds between two looks."""


class Leases:
    """What this process holds."""

    def __init__(self, objects: Objects) -> None:
        """Of the store at an address."""
        self._objects = objects
        self._held: list[Lease] = []

    def expect_held(self) -> None:
        """Raises ColdstillError once anything of it is another's."""
        for lease in list(self._held):
            lease.expect_held()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only writer."""
        # a first look: whoever joins meanwhile need not see the lock of one that is refused anyway
        self._expect_no_other()
        with self._hold(LOCK):
            self._expect_no_other()
            yield

    @contextlib.contextmanager
    def together(self, begin: Callable[[bool], None]) -> Iterator[None]:
        """Be one of several writers (`Place.join`)."""
        with contextlib.ExitStack() as membership:
            with self._patiently(STARTING):
                self._expect_nobody_alone()
                alone = self._member() is None
                # before the other is let go of: at no moment neither is there
                membership.enter_context(self._hold(f"{MEMBERS}{secrets.token_hex(8)}"))
                begin(alone)
            yield

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Be the only one at a piece of work; False if another process is."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._hold(name))
            except HeldError:
                yield False
                return
            yield True

    def bury(self) -> None:
        """Take away what dead writers held, and what was copied from elsewhere. Only while nobody
        else writes."""
        for name in sorted(self._objects.names(CLAIMS)):
            path = f"{CLAIMS}/{name}"
            with contextlib.suppress(DamageError):
                if self._living(path) is not None:
                    continue
            self._objects.remove(path)

    @contextlib.contextmanager
    def _hold(self, name: str) -> Iterator[None]:
        lease = Lease(self._objects, name=name)
        try:
            lease.acquire()
        except HeldError:
            raise
        except BaseException:
            lease.release()  # interrupted, or cut off: it may have it all the same
            raise
        self._held.append(lease)
        try:
            yield
        finally:
            self._held.remove(lease)
            lease.release()

    @contextlib.contextmanager
    def _patiently(self, name: str) -> Iterator[None]:
        until = time.monotonic() + _PATIENCE
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._hold(name))
                    break
                except HeldError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(_PAUSE)
            yield

    def _expect_no_other(self) -> None:
        # in this order: who has stopped joining in between is a member by then
        if other := self._living(STARTING) or self._member():
            raise refusal(self._objects, other)

    def _expect_nobody_alone(self) -> None:
        holder = holder_of(self._objects, LOCK)
        if holder is None:
            return
        if not holder.is_dead(time.time()):
            raise refusal(self._objects, holder)
        self._objects.remove(LOCK)  # or it would go on, should it only have been asleep

    def _member(self) -> Holder | None:
        """Another writer that is alive; what dead ones left is taken away."""
        for name in sorted(self._objects.names(CLAIMS)):
            path = f"{CLAIMS}/{name}"
            if not path.startswith(MEMBERS):
                continue
            if holder := self._living(path):
                return holder
            self._objects.remove(path)
        return None

    def _living(self, name: str) -> Holder | None:
        return living_holder(self._objects, name, time.time())
