"""The locks of a store in an object store, where no system lets go of what a killed process held.

An object says who writes; a thread renews it. One that was not renewed for long is dead. Two clocks
are compared with it, so "long" is more than clocks that services accept are apart.
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
from ..files import json_bytes, parse_json
from ..store.layout import LOCK
from ..store.seal import expect_seal, sealed, unsealed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .objects import Objects

RENEW = 60.0
"""Seconds between two signs of life."""
DEAD = 900.0
"""Seconds without one after which the writer is taken for dead."""
SETTLE = 2.0
"""Seconds until two who wrote at the same time must both see who was last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who writes."""

    token: str
    """Random: tells this process from every other."""
    host: str
    machine: str
    """Of the running system and its process ids; within it, a dead process is known as such."""
    process: int
    since: float
    """Seconds since 1970, as `renewed`."""
    renewed: float

    def __str__(self) -> str:
        """For the person who has to wait."""
        since = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.process} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"

    def is_dead(self, now: float) -> bool:
        """Whether nothing more will come of it."""
        if self.machine == _machine():
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return now - self.renewed > DEAD


_NOBODY = Holder(token="", host="", machine="", process=0, since=0.0, renewed=0.0)
"""Long dead."""


class HeldError(ColdstillError):
    """Another process has it."""


class Lease:
    """The right to be the only writer, or the only one at what `name` stands for."""

    def __init__(
        self,
        objects: Objects,
        clock: Callable[[], float] = time.time,
        settle: float = SETTLE,
        name: str = LOCK,
    ) -> None:
        """Ask for it with `acquire`."""
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
        """Take it.

        Raises
            HeldError: another process has it (who, and since when)
        """
        for _ in range(3):
            if self._objects.create(self._name, self._content()):
                # a service that ignores conditions says yes again, and to others too
                self._confirm(wait=self._objects.create(self._name, self._content()))
                break
            holder = self._holder()
            if holder is None:  # let go of just now
                continue
            if holder.token == self._mine.token:  # only the answer was lost
                break
            if not holder.is_dead(self._clock()):
                raise self._refusal(holder)
            self._objects.write(self._name, self._content())
            self._confirm(wait=True)
            break
        else:
            raise HeldError(f"{self._objects}: its lock comes and goes; try again")
        threading.Thread(target=self._keep, name="coldstill lease", daemon=True).start()

    def release(self) -> None:
        """Give it back, if it still is ours. What cannot be reached is left to die."""
        self._released.set()
        with self._renewing, contextlib.suppress(ColdstillError):
            holder = self._holder()
            if holder is not None and holder.token == self._mine.token:
                self._objects.remove(self._name)

    def expect_held(self) -> None:
        """Refuse to go on once it is another's.

        Raises
            ColdstillError: it is (whose)
        """
        if self._clock() - self._mine.renewed > DEAD / 2:  # asleep, or cut off: ask first
            self.renew()
        if self._lost is not None:
            raise ColdstillError(
                f"{self._objects}: {self._lost}, so nothing more is written here; once that "
                "process is done, run the same command again"
            )

    def renew(self) -> None:
        """Give a sign of life, or learn that it came too late."""
        with self._renewing:
            if self._lost is not None or self._released.is_set():
                return
            holder = self._holder()
            if holder is None or holder.token != self._mine.token:
                whose = "its lock was deleted" if holder is None else f"it is written by {holder}"
                self._lost = whose
                return
            renewed = replace(self._mine, renewed=self._clock())
            self._objects.write(self._name, _content(renewed))
            self._mine = renewed

    def _keep(self) -> None:
        while not self._released.wait(RENEW) and self._lost is None:
            # a network that is down for long is noticed by whoever wants to write
            with contextlib.suppress(Exception):
                self.renew()

    def _confirm(self, *, wait: bool) -> None:
        if wait:
            time.sleep(self._settle)
        holder = self._holder()
        if holder is None or holder.token != self._mine.token:
            raise self._refusal(holder)

    def _refusal(self, holder: Holder | None) -> HeldError:
        return refusal(self._objects, holder)

    def _content(self) -> bytes:
        return _content(self._mine)

    def _holder(self) -> Holder | None:
        return holder_of(self._objects, self._name)


def refusal(objects: Objects, holder: Holder | None) -> HeldError:
    """What is told to those who come second."""
    who = "" if holder is None else f": {holder}"
    return HeldError(
        f"{objects}: another process is writing this store{who}; wait for it (if it "
        f"died, its lock is void {DEAD / 60:.0f} minutes after its last sign of life)"
    )


def holder_of(objects: Objects, name: str) -> Holder | None:
    """Who has the lease `name`, alive or not.

    Raises
        DamageError: what lies there is none
    """
    where = objects.path(name)
    try:
        content = objects.read(name)
    except FileNotFoundError:
        return None
    if not content:  # what a disk's lock file is; it came here with a copy of the store
        return _NOBODY
    try:
        value = parse_json(content, where)
        expect_seal(value, where)
        return Holder(**unsealed(value))
    except (TypeError, AttributeError, ColdstillError) as error:
        raise DamageError(f"{where}: no lock of ours; delete it if nobody writes") from error


def living_holder(objects: Objects, name: str, now: float) -> Holder | None:
    """Who has it and is not known to be dead."""
    holder = holder_of(objects, name)
    return None if holder is None or holder.is_dead(now) else holder


def _content(holder: Holder) -> bytes:
    return json_bytes(sealed(asdict(holder)))


def _machine() -> str:
    """Names the running system and its table of processes; empty where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)  # nobody else's
    return hashlib.sha256(f"{boot}{table}".encode()).hexdigest()[:16]
