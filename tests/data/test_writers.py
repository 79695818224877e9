"""Writers of one object store: one alone or several together, and no lasting lock of dead ones."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import coldstill.data.places.lease
import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.claims import HeldError
from coldstill.data.places.lease import DEAD, Lease, Leases, holder_of
from coldstill.data.places.objects import Objects
from coldstill.data.store.layout import CLAIMS, LOCK, MEMBERS, STARTING, claim_name
from coldstill.data.store.writer import ShardWriter
from oracles import manifest_for, random_block

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
def conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Atomic requests, which object stores have and `memory://` does not."""
    one_at_a_time, original = threading.RLock(), Objects._call

    def call(self: Objects, *arguments: Any) -> Any:
        with one_at_a_time:
            return original(self, *arguments)

    monkeypatch.setattr(Objects, "_call", call)


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
    with pytest.raises(HeldError) as caught, context:
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_and_a_lone_writer_refuse_each_other_by_name(far: Distance) -> None:
    member = lease_of_another(far, f"{MEMBERS}1")
    said = f"{far.url}/store: another process is writing this store: process 7 on far, since"
    assert refusal_of(far.place().lock()).startswith(said)
    assert not far.place().exists(LOCK)
    member.release()
    told: list[bool] = []
    lock = lease_of_another(far, LOCK)
    assert refusal_of(far.place().join(told.append)).startswith(said)
    assert (told, names(far)) == ([], set())
    lock.release()
    with far.place().lock():
        pass


def test_dead_members_are_removed_and_write_nothing_more(memory: Distance) -> None:
    told: list[bool] = []
    dead = [lease_of_another(memory, f"{MEMBERS}{i}", silent=LONG_AGO) for i in range(2)]
    with memory.place().join(told.append):
        assert len(names(memory)) == 1
    dead.append(lease_of_another(memory, f"{MEMBERS}2", silent=LONG_AGO))
    with memory.place().lock():
        assert names(memory) == set()
    assert told == [True]
    for lease in dead:  # each of them was only paused
        with pytest.raises(ColdstillError, match="its lock was deleted, so this process writes n"):
            slept_over(lease)
        lease.release()


def slept_over(lease: Lease) -> None:
    """Continue after a pause, and try to write."""
    lease.renew()
    lease.expect_held()


def test_a_living_member_among_dead_ones_is_found(memory: Distance) -> None:
    told: list[bool] = []
    held = [lease_of_another(memory, f"{MEMBERS}{i}", silent=LONG_AGO) for i in (0, 2)]
    held.append(lease_of_another(memory, f"{MEMBERS}1"))
    refusal_of(memory.place().lock())
    with memory.place().join(told.append):
        pass
    assert told == [False]
    for lease in held:
        lease.release()


def test_a_paused_lone_writer_does_not_continue_beside_members(memory: Distance) -> None:
    asleep = lease_of_another(memory, LOCK, silent=LONG_AGO)
    with memory.place().join(nothing):
        asleep.renew()
        with pytest.raises(ColdstillError, match="its lock was deleted"):
            asleep.expect_held()
        assert not memory.place().exists(LOCK)
    asleep.release()


def test_a_process_that_is_joining_is_waited_for(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining = lease_of_another(memory, STARTING)
    refusal_of(memory.place().lock())  # a lone writer does not wait
    told: list[bool] = []
    threading.Timer(0.1, joining.release).start()
    with memory.place().join(told.append):
        assert joining._released.is_set()
    joining = lease_of_another(memory, STARTING)
    monkeypatch.setattr(coldstill.data.places.lease, "_PATIENCE", 0.05)
    assert "process 7 on far" in refusal_of(memory.place().join(told.append))
    assert told == [True]
    joining.release()


def test_a_process_that_fails_to_begin_leaves_nothing(far: Distance) -> None:
    def fail(alone: bool) -> None:
        raise KeyError

    with pytest.raises(KeyError), far.place().join(fail):
        pass
    assert names(far) == set()
    with far.place().lock():
        pass


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
    told: list[bool] = []
    original = Leases.expect_free
    joining = memory.place()

    def expect_free(self: Leases, name: str) -> None:
        original(self, name)
        if name == STARTING and self is not joining._leases:
            looked.append(name)
            if len(looked) == 2:  # it has its own lock by now
                said.append(refusal_of(joining.join(told.append)))

    said: list[str] = []
    monkeypatch.setattr(Leases, "expect_free", expect_free)
    with memory.place().lock():
        pass
    assert len(looked) == 2
    assert told == []
    assert len(said) == 1


def test_the_claim_of_a_dead_process_is_taken_over(memory: Distance, settled: None) -> None:
    asleep = lease_of_another(memory, claim_name(0), silent=LONG_AGO)
    alive = lease_of_another(memory, claim_name(1))
    with memory.place().claim(claim_name(0)) as mine, memory.place().claim(claim_name(1)) as its:
        assert (mine, its) == (True, False)
        asleep.renew()
        with pytest.raises(ColdstillError, match="is writing it"):
            asleep.expect_held()
        asleep.release()
        assert names(memory) == {"00000", "00001"}
    alive.release()


def test_a_claim_that_comes_and_goes_is_not_held(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "create", lambda *_: False)
    with memory.place().claim(claim_name(0)) as mine:
        assert not mine
    with pytest.raises(ColdstillError, match="its lock comes and goes; try again"):
        memory.place().lock().__enter__()


def test_a_writer_that_lost_a_claim_does_not_write_that_shard(memory: Distance) -> None:
    place = memory.place()
    with ShardWriter(f"{memory.url}/store", MANIFEST, shared=True) as writer:
        with writer.claim(0) as mine:
            assert mine
            lease = writer.place._leases._held[-1]  # type: ignore[attr-defined]
            place.remove(claim_name(0))
            heir = lease_of_another(memory, claim_name(0))
            lease.renew()  # as the thread does every minute
            with pytest.raises(ColdstillError, match=r"process 7 on far, since .* is writing it"):
                writer.write(0, FIRST)
        assert place.names("shards") == set()
        with writer.claim(0) as mine:
            assert not mine
        with writer.claim(1) as mine:  # it still holds the other claims
            assert mine
            writer.write(1, BLOCK.take(np.arange(4, 8)))
    assert place.names("shards") == {"00001.arrow", "00001.json"}
    heir.release()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ColdstillError("the network is down")])
def test_a_lease_that_was_not_confirmed_is_deleted(
    memory: Distance, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Lease, *, wait: bool) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_confirm", fail)
        with pytest.raises(type(error)):
            memory.place().claim(claim_name(0)).__enter__()
    assert names(memory) == set()


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
            with pytest.raises(ColdstillError, match="so this process writes nothing more"):
                writer.place.adopt(made, "shards/00000.arrow")
        lease._lost = None
    assert s3.place().names("shards") == set()
