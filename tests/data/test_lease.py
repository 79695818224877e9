"""Leases in an object store: one holder, known by name, and no lasting lock of a dead process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import coldstill.data.places.lease
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.lease import DEAD, Holder, Lease
from coldstill.data.places.objects import Objects
from coldstill.data.store.layout import LOCK
from oracles import manifest_for, random_block

if TYPE_CHECKING:
    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)
MANIFEST = manifest_for(BLOCK)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def objects_of(distance: Distance) -> Objects:
    return distance.place()._objects


def lease_of(distance: Distance, clock: Clock, **of_another: Any) -> Lease:
    """A lease of this process, or of another one with these fields."""
    lease = Lease(objects_of(distance), clock, settle=0.0)
    lease._mine = replace(lease._mine, **of_another)
    return lease


def elsewhere(distance: Distance, clock: Clock) -> Lease:
    """A lease of a process on another machine."""
    return lease_of(distance, clock, machine="another", host="far", process=7)


def refusal(lease: Lease) -> str:
    with pytest.raises(ColdstillError) as caught:
        lease.acquire()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_process_is_refused_by_name(far: Distance, clock: Clock) -> None:
    clock.now = 1_700_000_000.0
    first = elsewhere(far, clock)
    first.acquire()
    clock.now += DEAD - 1
    assert refusal(lease_of(far, clock)) == (
        f"{far.url}/store: another process is writing this store: process 7 on far, since "
        "2023-11-14 22:13:20 UTC; wait for it (if it died, its lock expires 15 minutes after its "
        "last renewal)"
    )
    first.release()
    second = lease_of(far, clock)
    second.acquire()
    second.expect_held()
    second.release()
    assert not far.place().exists(LOCK)


def test_a_lease_that_was_not_renewed_is_taken_over(far: Distance, clock: Clock) -> None:
    dead = elsewhere(far, clock)
    dead.acquire()
    clock.now += DEAD + 1
    heir = lease_of(far, clock)
    heir.acquire()
    heir.expect_held()
    with pytest.raises(ColdstillError) as caught:
        dead.expect_held()  # it was only paused
    heir_name = f"{far.url}/store: process {os.getpid()} on {socket.gethostname()}, since "
    assert str(caught.value).startswith(heir_name)
    assert "UTC is writing it, so this process writes nothing more" in str(caught.value)
    dead.release()  # which it no longer holds
    assert far.place().exists(LOCK)
    heir.release()


def test_a_thread_renews_the_lease(
    memory: Distance, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coldstill.data.places.lease, "RENEW", 0.01)
    first = elsewhere(memory, clock)
    first.acquire()
    clock.now += DEAD - 1
    end = time.monotonic() + 10
    while first._mine.renewed < clock.now and time.monotonic() < end:
        time.sleep(0.01)
    clock.now += 2
    refusal(lease_of(memory, clock))
    first.release()
    names = [thread.name for thread in threading.enumerate()]
    while "coldstill lease" in names and time.monotonic() < end:
        names = [thread.name for thread in threading.enumerate()]
    assert "coldstill lease" not in names


def test_a_dead_process_of_this_machine_is_known_to_be_dead(far: Distance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease_of(far, Clock(), process=gone.pid).acquire()
    heir = lease_of(far, Clock())
    heir.acquire()
    place = far.place()
    assert json.loads(place.read(LOCK))["process"] == os.getpid()
    heir.release()
    assert not place.exists(LOCK)


def test_a_lost_answer_does_not_lock_out_its_own_process(s3: Distance) -> None:
    s3.network.spoil("lost", rf"PUT .*{LOCK}", times=1)
    lease = lease_of(s3, Clock())
    lease.acquire()
    lease.expect_held()
    lease.release()


@pytest.mark.parametrize("knows_conditions", [True, False])
def test_one_of_many_processes_gets_the_lease(
    memory: Distance, knows_conditions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time, original = threading.Lock(), Objects.create

    def create(self: Objects, name: str, content: bytes) -> bool:
        if knows_conditions:
            with one_at_a_time:
                return original(self, name, content)
        self.write(name, content)
        return True

    monkeypatch.setattr(Objects, "create", create)
    leases = [Lease(objects_of(memory), settle=0.2) for _ in range(6)]
    got, refused = [], []

    def take(lease: Lease) -> None:
        try:
            lease.acquire()
            got.append(lease)
        except ColdstillError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 5
    assert all("another process is writing this store: process" in text for text in refused)
    got[0].release()


def test_an_object_that_is_not_a_lease_is_named_and_an_empty_one_is_free(
    memory: Distance, clock: Clock
) -> None:
    memory.place().write(LOCK, b"{}")
    assert refusal(lease_of(memory, clock)).startswith(f"{memory.url}/store/{LOCK}: not a lock of")
    memory.place().write(LOCK, b"")  # the lock file of a disk, copied with the store
    lease = lease_of(memory, clock)
    lease.acquire()
    lease.expect_held()
    lease.release()


def test_a_network_error_while_releasing_is_not_an_error_of_the_writer(s3: Distance) -> None:
    with s3.place().lock():
        s3.network.spoil("busy", LOCK)
    s3.network.faults.clear()
    assert s3.place().exists(LOCK)


def test_a_holder_is_shown_with_process_host_and_start() -> None:
    holder = Holder(token="t", host="h", machine="m", process=1, since=0.0, renewed=0.0)
    assert str(holder) == "process 1 on h, since 1970-01-01 00:00:00 UTC"
    assert holder.is_dead(DEAD + 1)
    assert not holder.is_dead(DEAD - 1)
    assert not holder.is_dead(-1e9)  # a clock that is ahead of ours
