"""Leases and writers of an object store: one alone or several together, known by name."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import coldstill.data.places.lease
import numpy as np
import pytest
from children import together
from coldstill.data.errors import ColdstillError
from coldstill.data.places.claims import HeldError
from coldstill.data.places.lease import DEAD, Holder, Lease, Leases, holder_of
from coldstill.data.places.objects import Objects
from coldstill.data.store.layout import CLAIMS, LOCK, MEMBERS, STARTING, claim_name
from coldstill.data.store.writer import ShardWriter
from oracles import manifest_for, random_block
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)
MANIFEST = manifest_for(BLOCK)
FIRST = BLOCK.take(np.arange(4))
LONG_AGO = DEAD + 1


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less between two attempts."""
    monkeypatch.setattr(coldstill.data.places.lease, "_PAUSE", 0.005)


@pytest.fixture(autouse=True)
def _all_is_released() -> Iterator[None]:
    """No thread continues to renew a lease."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 3
    while any(t.name == "coldstill lease" for t in set(threading.enumerate()) - before):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a service to settle."""
    confirm = Lease._confirm
    monkeypatch.setattr(Lease, "_confirm", lambda self, *, wait: confirm(self, wait=False))


def lease_of_another(distance: Distance, name: str, *, silent: float = 0.0) -> Lease:
    """A lease of a process on another machine that renewed it `silent` seconds ago."""
    then = time.time() - silent
    lease = Lease(distance.place()._objects, lambda: then, settle=0.0, name=name)
    lease._mine = replace(lease._mine, machine="another", host="far", process=7)
    lease.acquire()
    return lease


def nothing(alone: bool) -> None:
    """Begin without doing anything."""


def names(distance: Distance) -> set[str]:
    return distance.place().names(CLAIMS)


def refusal_of(context: contextlib.AbstractContextManager[Any]) -> str:
    return refusal(context.__enter__)


@pytest.mark.slow
def test_a_member_and_a_lone_writer_refuse_each_other_by_name(far: Distance) -> None:
    member = lease_of_another(far, f"{MEMBERS}1")
    expected = f"{far.url}/store: another process is writing this store: process 7 on far, since"
    assert refusal_of(far.place().lock()).startswith(expected)
    assert not far.place().exists(LOCK)
    member.release()
    alone_N: list[bool] = []
    lock = lease_of_another(far, LOCK)
    assert refusal_of(far.place().join(alone_N.append)).startswith(expected)
    assert (alone_N, names(far)) == ([], set())
    lock.release()

    def fail(alone: bool) -> None:
        raise KeyError

    with pytest.raises(KeyError), far.place().join(fail):
        pass
    assert names(far) == set()
    with far.place().lock():  # what failed or was refused leaves nothing
        pass


def test_dead_members_are_removed_and_write_nothing_more(memory: Distance) -> None:
    alone_N: list[bool] = []
    dead = [lease_of_another(memory, f"{MEMBERS}{i}", silent=LONG_AGO) for i in range(2)]
    with memory.place().join(alone_N.append):
        assert len(names(memory)) == 1
    dead.append(lease_of_another(memory, f"{MEMBERS}2", silent=LONG_AGO))
    with memory.place().lock():
        assert names(memory) == set()
    for lease in dead:  # each of them was only paused
        lease.renew()
        message = refusal(lease.expect_held)
        assert "its lock was deleted, so this process writes nothing" in message
        lease.release()
    held = [lease_of_another(memory, f"{MEMBERS}{i}", silent=LONG_AGO) for i in (0, 2)]
    held.append(lease_of_another(memory, f"{MEMBERS}1"))  # a living one among them
    refusal_of(memory.place().lock())
    with memory.place().join(alone_N.append):
        pass
    assert alone_N == [True, False]
    for lease in held:
        lease.release()


def test_a_paused_writer_does_not_continue_beside_its_successors(
    memory: Distance, settled: None
) -> None:
    asleep = lease_of_another(memory, LOCK, silent=LONG_AGO)
    with memory.place().join(nothing):
        asleep.renew()
        assert "its lock was deleted" in refusal(asleep.expect_held)
        assert not memory.place().exists(LOCK)
    asleep.release()
    asleep = lease_of_another(memory, claim_name(0), silent=LONG_AGO)
    alive = lease_of_another(memory, claim_name(1))
    with memory.place().claim(claim_name(0)) as mine, memory.place().claim(claim_name(1)) as its:
        assert (mine, its) == (True, False)
        asleep.renew()
        assert "is writing it" in refusal(asleep.expect_held)
        asleep.release()
        assert names(memory) == {"00000", "00001"}
    alive.release()


def test_a_process_that_is_joining_is_waited_for(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining = lease_of_another(memory, STARTING)
    refusal_of(memory.place().lock())  # a lone writer does not wait
    alone_N: list[bool] = []
    threading.Timer(0.1, joining.release).start()
    with memory.place().join(alone_N.append):
        assert joining._released.is_set()
    joining = lease_of_another(memory, STARTING)
    monkeypatch.setattr(coldstill.data.places.lease, "_PATIENCE", 0.05)
    assert "process 7 on far" in refusal_of(memory.place().join(alone_N.append))
    assert alone_N == [True]
    joining.release()


@pytest.mark.slow
def test_a_lone_writer_never_writes_beside_others(memory: Distance, conditions: None) -> None:
    """In any order of writing and looking."""
    inside = {"alone": 0, "together": 0}
    wrong: list[dict[str, int]] = []
    came = {"alone": 0, "together": 0}
    counting = threading.Lock()

    def take_part(kind: str, enter: Callable[[], Any], until: float) -> None:
        random = np.random.default_rng()
        while time.monotonic() < until and min(came.values()) < 40:
            time.sleep(float(random.uniform(0.0, 0.01)))
            with contextlib.suppress(HeldError), enter():
                with counting:
                    inside[kind] += 1
                    came[kind] += 1
                    if inside["alone"] > 1 or (inside["alone"] and inside["together"]):
                        wrong.append(dict(inside))
                time.sleep(0.001)
                with counting:
                    inside[kind] -= 1

    until = time.monotonic() + 10.0
    threads = []
    for kind in ("alone", "together") * 2:
        place = memory.place()
        enter = place.lock if kind == "alone" else lambda place=place: place.join(nothing)
        threads.append(threading.Thread(target=take_part, args=(kind, enter, until)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(came.values()) > 0, came


def test_a_process_that_joins_sees_a_lock_that_was_taken_after_the_first_look(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process joins just after the lone writer has looked and found nothing."""
    looked: list[Any] = []
    alone_N: list[bool] = []
    original = Leases.expect_free
    joining = memory.place()

    def expect_free(self: Leases, name: str) -> None:
        original(self, name)
        if name == STARTING and self is not joining._leases:
            looked.append(name)
            if len(looked) == 2:  # it has its own lock by now
                refusal_of(joining.join(alone_N.append))

    monkeypatch.setattr(Leases, "expect_free", expect_free)
    with memory.place().lock():
        pass
    assert len(looked) == 2
    assert alone_N == []


def test_a_claim_that_comes_and_goes_or_is_not_confirmed_is_not_held(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "create", lambda *_: False)
        with memory.place().claim(claim_name(0)) as mine:
            assert not mine
        assert "its lock is taken and released repeatedly" in refusal_of(memory.place().lock())
    for error in (KeyboardInterrupt(), ColdstillError("the network is down")):

        def fail(self: Lease, *, wait: bool, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Lease, "_confirm", fail)
            with pytest.raises(type(error)):
                memory.place().claim(claim_name(0)).__enter__()
        assert names(memory) == set()


def test_a_writer_that_lost_a_claim_does_not_write_that_shard(memory: Distance) -> None:
    place = memory.place()
    with ShardWriter(f"{memory.url}/store", MANIFEST, shared=True) as writer:
        with writer.claim(0) as mine:
            assert mine
            lease = writer.place._leases._held[-1]  # type: ignore[attr-defined]
            place.remove(claim_name(0))
            heir = lease_of_another(memory, claim_name(0))
            lease.renew()  # as the thread does every minute
            message = refusal(writer.write, 0, FIRST)
            assert "process 7 on far, since" in message
            assert "is writing it" in message
        assert place.names("shards") == set()
        with writer.claim(0) as mine:
            assert not mine
        with writer.claim(1) as mine:  # it still holds the other claims
            assert mine
            writer.write(1, BLOCK.take(np.arange(4, 8)))
    assert place.names("shards") == {"00001.arrow", "00001.json"}
    heir.release()


def test_clearing_deletes_only_the_leases_of_dead_processes(memory: Distance) -> None:
    place = memory.place()
    held = [
        lease_of_another(memory, claim_name(0), silent=LONG_AGO),
        lease_of_another(memory, f"{MEMBERS}1", silent=LONG_AGO),
        lease_of_another(memory, claim_name(1)),
    ]
    place.write(f"{CLAIMS}/00007", b"")  # copied with the store from a disk
    place.write(f"{CLAIMS}/00008", b"{}")
    place.clear()
    assert names(memory) == {"00001"}
    with place.join(lambda alone: place.clear()), place.claim(claim_name(2)) as mine:
        place.clear()
        assert mine
        assert {"00001", "00002"} < names(memory)
        assert len(names(memory)) == 3  # and itself
    for lease in held:
        lease.release()


def test_a_claim_that_arrives_damaged_is_read_again(s3: Distance) -> None:
    holder = lease_of_another(s3, claim_name(0))
    s3.network.spoil("flipped", rf"GET .*{claim_name(0)}", times=1)
    found = holder_of(s3.place()._objects, claim_name(0))
    assert found is not None
    assert found.token == holder._mine.token
    assert json.loads(s3.place().read(claim_name(0)))["host"] == "far"
    holder.release()


def test_a_process_paused_in_an_upload_checks_its_lease_before_it_repeats_the_upload(
    s3: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(f"{s3.url}/store", MANIFEST, shared=True) as writer, writer.claim(0) as mine:
        assert mine
        [*_, lease] = writer.place._leases._held  # type: ignore[attr-defined]
        connected = Objects._system
        tries: list[int] = []

        def system(self: Objects) -> Any:
            if self is writer.place._objects and not tries:  # type: ignore[attr-defined]
                tries.append(1)
                lease._lost = "process 7 on far is writing it"  # meanwhile
                raise ConnectionResetError
            return connected(self)

        made = s3.cache.place / "made"
        made.parent.mkdir(exist_ok=True)
        made.write_bytes(b"late")
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "_system", system)
            message = refusal(writer.place.adopt, made, "shards/00000.arrow")
            assert "so this process writes nothing more" in message
        lease._lost = None
    assert s3.place().names("shards") == set()


def lease_of(distance: Distance, clock: Callable[[], float], **of_another: Any) -> Lease:
    """A lease of this process, or of another one with these fields."""
    lease = Lease(distance.place()._objects, clock, settle=0.0)
    lease._mine = replace(lease._mine, **of_another)
    return lease


def elsewhere(distance: Distance, clock: Callable[[], float]) -> Lease:
    """A lease of a process on another machine."""
    return lease_of(distance, clock, machine="another", host="far", process=7)


class Clock:
    """A clock that is set by hand."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_second_process_is_refused_by_name(far: Distance, clock: Clock) -> None:
    first = elsewhere(far, clock)
    first.acquire()
    clock.now += DEAD - 1
    assert refusal(lease_of(far, clock).acquire) == (
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
    dead, heir = elsewhere(far, clock), lease_of(far, clock)
    dead.acquire()
    clock.now += DEAD + 1
    heir.acquire()
    heir.expect_held()
    message = refusal(dead.expect_held)  # it was only paused
    name = f"{far.url}/store: process {os.getpid()} on {socket.gethostname()}, since "
    assert message.startswith(name)
    assert "UTC is writing it, so this process writes nothing more" in message
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
    refusal(lease_of(memory, clock).acquire)
    first.release()
    names = [thread.name for thread in threading.enumerate()]
    while "coldstill lease" in names and time.monotonic() < end:
        names = [thread.name for thread in threading.enumerate()]
    assert "coldstill lease" not in names


def test_a_dead_process_of_this_machine_is_recognised(far: Distance, clock: Clock) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = lease_of(far, clock, process=gone.pid)
    dead.acquire()
    heir = lease_of(far, clock)
    heir.acquire()
    place = far.place()
    assert json.loads(place.read(LOCK))["process"] == os.getpid()
    heir.release()
    assert not place.exists(LOCK)
    dead.release()


def test_network_errors_do_not_stop_the_writer(s3: Distance, clock: Clock) -> None:
    """Neither a lost answer while acquiring nor an error while releasing."""
    s3.network.spoil("lost", rf"PUT .*{LOCK}", times=1)
    lease = lease_of(s3, clock)
    lease.acquire()
    lease.expect_held()
    lease.release()
    with s3.place().lock():
        s3.network.spoil("busy", LOCK)
    s3.network.faults.clear()
    assert s3.place().exists(LOCK)


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
    leases = [Lease(memory.place()._objects, settle=0.2) for _ in range(6)]

    def take(lease: Lease) -> str:
        try:
            lease.acquire()
        except ColdstillError as error:
            return str(error)
        return "mine"

    answers = together(*(functools.partial(take, lease) for lease in leases))
    assert answers.count("mine") == 1
    refused = [a for a in answers if "another process is writing this store: process" in a]
    assert len(refused) == 5
    leases[answers.index("mine")].release()


def test_an_object_that_is_not_a_lease_is_named_and_an_empty_one_is_free(
    memory: Distance, clock: Clock
) -> None:
    memory.place().write(LOCK, b"{}")
    lease = lease_of(memory, clock)
    assert refusal(lease.acquire).startswith(f"{memory.url}/store/{LOCK}: not a lock of")
    memory.place().write(LOCK, b"")  # the lock file of a disk, copied with the store
    lease.acquire()
    lease.expect_held()
    lease.release()


def test_a_holder_is_shown_with_process_host_and_start() -> None:
    holder = Holder(token="t", host="h", machine="m", process=1, since=0.0, renewed=0.0)
    assert str(holder) == "process 1 on h, since 1970-01-01 00:00:00 UTC"
    assert holder.is_dead(DEAD + 1)
    assert not holder.is_dead(DEAD - 1)
    assert not holder.is_dead(-1e9)  # a clock that is ahead of ours
