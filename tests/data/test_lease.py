"""The lock of a distant store: one writer, known by name, and no dead one in the way."""

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
import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.lease import DEAD, RENEW, Holder, Lease
from coldstill.data.places.objects import Objects
from coldstill.data.store.layout import LOCK
from coldstill.data.store.writer import ShardWriter
from oracles import manifest_for, random_block

if TYPE_CHECKING:
    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)
MANIFEST = manifest_for(BLOCK)


class Clock:
    """Time that passes when it is told to."""

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
    """A lease of this process, or of another that is told apart by some of its fields."""
    lease = Lease(objects_of(distance), clock, settle=0.0)
    lease._mine = replace(lease._mine, **of_another)
    return lease


def elsewhere(distance: Distance, clock: Clock) -> Lease:
    """Of a process on another machine."""
    return lease_of(distance, clock, machine="another", host="far", process=7)


def refusal(lease: Lease) -> str:
    with pytest.raises(ColdstillError) as caught:
        lease.acquire()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_second_is_told_who_and_since_when(far: Distance, clock: Clock) -> None:
    clock.now = 1_700_000_000.0
    first = elsewhere(far, clock)
    first.acquire()
    clock.now += DEAD - 1
    assert refusal(lease_of(far, clock)) == (
        f"{far.url}/store: another process is writing this store: process 7 on far, since "
        "2023-11-14 22:13:20 UTC; wait for it (if it died, its lock is void 15 minutes after its "
        "last sign of life)"
    )
    first.release()
    second = lease_of(far, clock)
    second.acquire()
    second.expect_held()
    second.release()
    assert not far.place().exists(LOCK)


def test_one_that_gives_no_sign_of_life_is_taken_over(far: Distance, clock: Clock) -> None:
    dead = elsewhere(far, clock)
    dead.acquire()
    clock.now += DEAD + 1
    heir = lease_of(far, clock)
    heir.acquire()
    heir.expect_held()
    with pytest.raises(ColdstillError) as caught:
        dead.expect_held()  # it was only asleep
    said = f"{far.url}/store: it is written by process {os.getpid()} on {socket.gethostname()}"
    assert str(caught.value).startswith(said)
    assert "nothing more is written here" in str(caught.value)
    dead.release()  # which is not its own any more
    assert far.place().exists(LOCK)
    heir.release()


def test_signs_of_life_keep_it(memory: Distance, clock: Clock) -> None:
    first = elsewhere(memory, clock)
    first.acquire()
    for _ in range(40):
        clock.now += RENEW
        first.renew()
    refusal(lease_of(memory, clock))
    first.expect_held()
    first.release()


def test_a_thread_gives_the_signs(
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


def test_a_process_of_this_machine_that_is_gone_is_known_to_be(far: Distance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease_of(far, Clock(), process=gone.pid).acquire()
    heir = lease_of(far, Clock())
    heir.acquire()
    place = far.place()
    assert json.loads(place.read(LOCK))["process"] == os.getpid()
    heir.release()
    assert not place.exists(LOCK)


def test_a_writer_that_lost_its_lock_writes_nothing_more(memory: Distance) -> None:
    place = memory.place()
    with ShardWriter(f"{memory.url}/store", MANIFEST) as writer:
        assert place.exists("manifest.json")
        [lease] = writer.place._leases._held  # type: ignore[attr-defined]
        place._objects.remove(LOCK)
        other = elsewhere(memory, Clock())
        other.acquire()
        lease.renew()  # what the thread does every minute
        with pytest.raises(ColdstillError, match="it is written by process 7 on far, since"):
            writer.write(0, BLOCK.take(np.arange(4)))
    assert place.names("shards") == set()
    assert place.exists(LOCK)  # the other's
    other.release()


def test_a_lock_that_somebody_deleted_is_lost(memory: Distance, clock: Clock) -> None:
    lease = lease_of(memory, clock)
    lease.acquire()
    memory.place().remove(LOCK)
    lease.renew()
    with pytest.raises(ColdstillError, match="its lock was deleted, so nothing more is written"):
        lease.expect_held()
    lease.release()


def test_an_answer_that_is_lost_does_not_lock_us_out(s3: Distance) -> None:
    s3.network.spoil("lost", rf"PUT .*{LOCK}", times=1)
    lease = lease_of(s3, Clock())
    lease.acquire()
    lease.expect_held()
    lease.release()


@pytest.mark.parametrize("knows_conditions", [True, False])
def test_of_many_at_once_one_gets_it(
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


def test_what_is_no_lock_of_ours_is_named(memory: Distance, clock: Clock) -> None:
    memory.place().write(LOCK, b"{}")
    said = refusal(lease_of(memory, clock))
    assert said.startswith(f"{memory.url}/store/{LOCK}: ")


def test_a_lock_file_that_was_copied_from_a_disk_is_nobodys(memory: Distance) -> None:
    memory.place().write(LOCK, b"")
    lease = lease_of(memory, Clock())
    lease.acquire()
    lease.expect_held()
    lease.release()


def test_a_network_that_is_down_at_the_end_does_not_hide_that_all_is_written(
    s3: Distance,
) -> None:
    with s3.place().lock():
        s3.network.spoil("busy", LOCK)
    s3.network.faults.clear()
    assert s3.place().exists(LOCK)


def test_holders_say_where_and_since_when() -> None:
    holder = Holder(token="t", host="h", machine="m", process=1, since=0.0, renewed=0.0)
    assert str(holder) == "process 1 on h, since 1970-01-01 00:00:00 UTC"
    assert holder.is_dead(DEAD + 1)
    assert not holder.is_dead(DEAD - 1)
    assert not holder.is_dead(-1e9)  # a clock that is ahead of ours
