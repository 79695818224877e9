"""Locks in an object store, where no system unlocks what a killed process held.

An object names the process that holds the lock, and a thread renews it. A lock that was not renewed
for `DEAD` seconds may be taken over. The limit is far longer than the clocks of machines differ, as
services refuse requests from machines whose clocks differ by more.

A process that was paused checks its locks again before it writes, at each attempt. Two processes
can write the same shard only if one of them was paused inside a single request. The commit record
then decides: every reader refuses a shard whose bytes are not those of its record, and a repair
deletes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError, DamageError
from ..files import json_bytes
from ..store.layout import LOCK, sealed, unseal
from .claims import HeldError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .objects import Objects

RENEW = 60.0
"""Seconds between two renewals."""
DEAD = 900.0
"""Seconds without a renewal after which another process may take the lock over."""
SETTLE = 2.0
"""Seconds after which two processes that wrote at the same time both see who was last."""
_PATIENCE = DEAD + 2 * RENEW
"""Seconds to wait for a lock: by then a dead holder is known to be dead."""
_PAUSE = 0.5
"""Seconds between two attempts while waiting for a lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    token: str
    """A random number that identifies this process."""
    host: str
    machine: str
    """Identifies the running system and its process table, in which a dead process is seen."""
    process: int
    since: float
    """When the lock was taken, in seconds since 1970."""
    renewed: float
    """When the lock was last renewed, in seconds since 1970."""

    def __str__(self) -> str:
        """Text for the message to a person who has to wait."""
        since = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.process} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"

    def is_dead(self, now: float) -> bool:
        """Whether the process is known to be gone, or has not renewed for too long."""
        if self.machine == _machine():
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return now - self.renewed > DEAD


class Lease:
    """A lock that has to be renewed."""

    def __init__(
        self,
        objects: Objects,
        clock: Callable[[], float] = time.time,
        settle: float = SETTLE,
        name: str = LOCK,
    ) -> None:
        self._objects = objects
        self._name = name
        self._clock = clock
        self._settle = settle
        now = clock()
        self._mine = Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            since=now,
            renewed=now,
        )
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, and renew it in a thread from then on. Raises HeldError if another process
        has it (which one, and since when)."""
        for _ in range(3):
            if self._objects.create(self._name, self._content()):
                # A service that ignores conditions also accepts the second object, from anyone.
                self._confirm(wait=self._objects.create(self._name, self._content()))
            elif (holder := holder_of(self._objects, self._name)) is None:  # released just now
                continue
            elif holder.token != self._mine.token:  # otherwise only the answer was lost
                if not holder.is_dead(self._clock()):
                    raise refusal(self._objects, holder)
                self._objects.write(self._name, self._content())
                self._confirm(wait=True)
            threading.Thread(target=self._keep, name="coldstill lease", daemon=True).start()
            return
        raise HeldError(f"{self._objects}: its lock is taken and released repeatedly; try again")

    def release(self) -> None:
        """Delete the lock if this process still has it. If the network fails, the lock expires."""
        self._released.set()
        with self._renewing, contextlib.suppress(ColdstillError):
            holder = holder_of(self._objects, self._name)
            if holder is not None and holder.token == self._mine.token:
                self._objects.remove(self._name)

    def expect_held(self) -> None:
        """Raise ColdstillError if another process has taken the lock over (which one)."""
        if self._clock() - self._mine.renewed > DEAD / 2:  # paused or without a network: ask first
            self.renew()
        if self._lost is not None:
            raise ColdstillError(
                f"{self._objects}: {self._lost}, so this process writes nothing more; when the "
                "other process has finished, run the same command again"
            )

    def renew(self) -> None:
        """Renew the lock, or note that another process has it."""
        with self._renewing:
            if self._lost is not None or self._released.is_set():
                return
            holder = holder_of(self._objects, self._name)
            if holder is None or holder.token != self._mine.token:
                whose = "its lock was deleted" if holder is None else f"{holder} is writing it"
                self._lost = whose
                return
            renewed = replace(self._mine, renewed=self._clock())
            self._objects.write(self._name, json_bytes(sealed(asdict(renewed))))
            self._mine = renewed

    def _keep(self) -> None:
        while not self._released.wait(RENEW) and self._lost is None:
            # If the network fails for long, the next write reports it.
            with contextlib.suppress(Exception):
                self.renew()

    def _confirm(self, *, wait: bool) -> None:
        if wait:
            time.sleep(self._settle)
        holder = holder_of(self._objects, self._name)
        if holder is None or holder.token != self._mine.token:
            raise refusal(self._objects, holder)

    def _content(self) -> bytes:
        return json_bytes(sealed(asdict(self._mine)))


class Leases:
    """The leases that one process holds in one store (`Locks`)."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._held: list[Lease] = []
        self.names, self.remove = objects.names, objects.remove

    def expect_held(self) -> None:
        for lease in list(self._held):
            lease.expect_held()

    @contextlib.contextmanager
    def hold(self, name: str, *, wait: bool = False) -> Iterator[None]:
        until = time.monotonic() + (_PATIENCE if wait else 0.0)
        while True:
            lease = Lease(self._objects, name=name)
            try:
                lease.acquire()
                break
            except HeldError:
                if time.monotonic() >= until:
                    raise
            except BaseException:
                lease.release()  # interrupted or without a network: it may be held all the same
                raise
            time.sleep(_PAUSE)
        self._held.append(lease)
        try:
            yield
        finally:
            self._held.remove(lease)
            lease.release()

    def expect_free(self, name: str) -> None:
        holder = holder_of(self._objects, name)
        if holder is not None and not holder.is_dead(time.time()):
            raise refusal(self._objects, holder)


def refusal(objects: Objects, holder: Holder | None) -> HeldError:
    """The error for a process that came second."""
    who = "" if holder is None else f": {holder}"
    return HeldError(
        f"{objects}: another process is writing this store{who}; wait for it (if it died, its lock "
        f"expires {DEAD / 60:.0f} minutes after its last renewal)"
    )


def holder_of(objects: Objects, name: str) -> Holder | None:
    """The process that holds the lock `name`, alive or dead; None if there is no such lock. Raises
    DamageError if the object is not a lock of coldstill."""
    try:
        content = objects.read(name)
    except FileNotFoundError:
        return None
    if not content:  # a lock file of a disk that was copied with the store: no process holds it
        return Holder(token="", host="", machine="", process=0, since=0.0, renewed=0.0)
    where = objects.path(name)
    try:
        return Holder(**unseal(content, where))
    except (TypeError, ColdstillError) as error:
        raise DamageError(
            f"{where}: not a lock of coldstill; delete it if no process writes"
        ) from error


def _machine() -> str:
    """Identify the running system and its process table; a random number if that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)
    return hashlib.sha256(f"{boot}{table}".encode()).hexdigest()[:16]
