"""What several processes hold of one distant store: nothing twice, and nothing by the dead."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import coldstill.data.places.leases
import numpy as np
import pytest
from coldstill.data.errors import ColdstillError, DamageError
from coldstill.data.places.lease import DEAD, HeldError, Lease, holder_of
from coldstill.data.places.leases import Leases
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
    """Nobody looks twice a second only."""
    monkeypatch.setattr(coldstill.data.places.leases, "_PAUSE", 0.005)


@pytest.fixture(autouse=True)
def _all_is_let_go_of() -> Iterator[None]:
    """No thread goes on giving signs of life."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 3
    while any(t.name == "coldstill lease" for t in set(threading.enumerate()) - before):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What object stores know and `memory://` does not: one thing after the other."""
    one_at_a_time, original = threading.RLock(), Objects._call

    def call(self: Objects, name: str, call: Callable[[Any, str], Any]) -> Any:
        with one_at_a_time:
            return original(self, name, call)

    monkeypatch.setattr(Objects, "_call", call)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a service to settle."""
    confirm = Lease._confirm
    monkeypatch.setattr(Lease, "_confirm", lambda self, *, wait: confirm(self, wait=False))


def leases_of(distance: Distance) -> Leases:
    return distance.place()._leases


def lease_of_another(distance: Distance, name: str, *, silent: float = 0.0) -> Lease:
    """Held by a process on another machine, that gave its last sign of life so long ago."""
    then = time.time() - silent
    lease = Lease(distance.place()._objects, lambda: then, settle=0.0, name=name)
    lease._mine = replace(lease._mine, machine="another", host="far", process=7)
    lease.acquire()
    return lease


def nothing(alone: bool) -> None:
    """At the beginning."""


def names(distance: Distance) -> set[str]:
    return distance.place().names(CLAIMS)


def refusal_of(context: contextlib.AbstractContextManager[Any]) -> str:
    with pytest.raises(HeldError) as caught, context:
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_is_there_as_long_as_it_takes_part(far: Distance) -> None:
    told: list[bool] = []
    with far.place().join(told.append):
        [member] = names(far)
        assert f"{CLAIMS}/{member}".startswith(MEMBERS)
        with far.place().join(told.append):
            assert len(names(far)) == 2
        assert names(far) == {member}
    assert names(far) == set()
    assert told == [True, False]


def test_who_writes_alone_is_told_which_member_is_there(far: Distance) -> None:
    member = lease_of_another(far, f"{MEMBERS}1")
    said = f"{far.url}/store: another process is writing this store: process 7 on far, since"
    assert refusal_of(far.place().lock()).startswith(said)
    assert not far.place().exists(LOCK)
    member.release()
    with far.place().lock():
        pass


def test_who_joins_is_told_who_writes_alone(far: Distance) -> None:
    told: list[bool] = []
    lock = lease_of_another(far, LOCK)
    said = f"{far.url}/store: another process is writing this store: process 7 on far, since"
    assert refusal_of(far.place().join(told.append)).startswith(said)
    assert (told, names(far)) == ([], set())
    lock.release()


def test_dead_members_are_in_nobodys_way(memory: Distance) -> None:
    told: list[bool] = []
    dead = [lease_of_another(memory, f"{MEMBERS}{i}", silent=LONG_AGO) for i in range(2)]
    with memory.place().join(told.append):
        assert len(names(memory)) == 1
    dead.append(lease_of_another(memory, f"{MEMBERS}2", silent=LONG_AGO))
    with memory.place().lock():
        assert names(memory) == set()
    assert told == [True]
    for lease in dead:  # each of them was only asleep
        with pytest.raises(ColdstillError, match="its lock was deleted, so nothing more is writt"):
            slept_over(lease)
        lease.release()


def slept_over(lease: Lease) -> None:
    """It wakes up, and wants to write."""
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


def test_one_that_slept_over_its_lock_does_not_go_on_beside_members(memory: Distance) -> None:
    asleep = lease_of_another(memory, LOCK, silent=LONG_AGO)
    with memory.place().join(nothing):
        asleep.renew()
        with pytest.raises(ColdstillError, match="its lock was deleted"):
            asleep.expect_held()
        assert not memory.place().exists(LOCK)
    asleep.release()


def test_one_that_died_while_joining_is_taken_over(memory: Distance, settled: None) -> None:
    dead = lease_of_another(memory, STARTING, silent=LONG_AGO)
    told: list[bool] = []
    with memory.place().join(told.append):
        pass
    assert told == [True]
    dead.release()


def test_one_that_is_joining_is_waited_for(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining = lease_of_another(memory, STARTING)
    refusal_of(memory.place().lock())  # who writes alone does not wait
    told: list[bool] = []
    threading.Timer(0.1, joining.release).start()
    with memory.place().join(told.append):
        assert joining._released.is_set()
    joining = lease_of_another(memory, STARTING)
    monkeypatch.setattr(coldstill.data.places.leases, "_PATIENCE", 0.05)
    assert "process 7 on far" in refusal_of(memory.place().join(told.append))
    assert told == [True]
    joining.release()


def test_no_two_begin_at_once_and_one_of_them_is_told_that_it_is_alone(
    memory: Distance, conditions: None
) -> None:
    at_once: list[int] = []
    inside = [0]
    told: list[bool] = []
    all_in = threading.Barrier(5)

    def begin(alone: bool) -> None:
        inside[0] += 1
        time.sleep(0.02)
        at_once.append(inside[0])
        told.append(alone)
        inside[0] -= 1

    def write() -> None:
        with memory.place().join(begin):
            all_in.wait(20)

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1] * 5
    assert told == [True, False, False, False, False]
    assert names(memory) == set()


def test_one_that_fails_to_begin_leaves_nothing(far: Distance) -> None:
    def fail(alone: bool) -> None:
        raise KeyError

    with pytest.raises(KeyError), far.place().join(fail):
        pass
    assert names(far) == set()
    with far.place().lock():
        pass


def test_never_one_alone_and_others_at_the_same_time(memory: Distance, conditions: None) -> None:
    """Whatever the order in which they write and look."""
    inside = {"alone": 0, "together": 0}
    wrong: list[dict[str, int]] = []
    came = {"alone": 0, "together": 0}
    counting = threading.Lock()

    def take_part(kind: str, enter: Callable[[], Any], until: float) -> None:
        random = np.random.default_rng()
        while time.monotonic() < until and min(came.values()) < 80:
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
        leases = leases_of(memory)
        enter = leases.alone if kind == "alone" else lambda held=leases: held.together(nothing)
        threads.append(threading.Thread(target=take_part, args=(kind, enter, until)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(came.values()) > 0, came


def test_a_lock_that_is_seen_by_who_joins_keeps_it_out(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One joins just after the other has looked for it and found nothing."""
    looked: list[Any] = []
    told: list[bool] = []
    original = Leases._living
    joining = memory.place()

    def living(self: Leases, name: str) -> Any:
        found = original(self, name)
        if name == STARTING and self is not joining._leases:
            looked.append(found)
            if len(looked) == 2:  # now with its own lock there
                said.append(refusal_of(joining.join(told.append)))
        return found

    said: list[str] = []
    monkeypatch.setattr(Leases, "_living", living)
    with memory.place().lock():
        pass
    assert looked == [None, None]
    assert told == []
    assert len(said) == 1


def test_a_claim_is_one_processes(far: Distance) -> None:
    one, other = far.place(), far.place()
    with one.claim(claim_name(0)) as mine, other.claim(claim_name(0)) as its:
        assert (mine, its) == (True, False)
        with other.claim(claim_name(1)) as its, one.claim(claim_name(0)) as again:
            assert (its, again) == (True, False)
        assert names(far) == {"00000"}  # who was refused has not let go of it
    assert names(far) == set()


def test_of_many_claims_at_once_one_holds(memory: Distance, conditions: None) -> None:
    start, done = threading.Barrier(6), threading.Barrier(6)
    seen: list[bool] = []

    def claim() -> None:
        place = memory.place()
        start.wait(10)
        with place.claim(claim_name(3)) as mine:
            seen.append(mine)
            done.wait(10)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [False] * 5 + [True]


def test_a_dead_ones_claim_is_taken_over(memory: Distance, settled: None) -> None:
    asleep = lease_of_another(memory, claim_name(0), silent=LONG_AGO)
    alive = lease_of_another(memory, claim_name(1))
    with memory.place().claim(claim_name(0)) as mine, memory.place().claim(claim_name(1)) as its:
        assert (mine, its) == (True, False)
        asleep.renew()
        with pytest.raises(ColdstillError, match="it is written by process"):
            asleep.expect_held()
        asleep.release()
        assert names(memory) == {"00000", "00001"}
    alive.release()


def test_a_claim_that_comes_and_goes_is_another_processes(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "create", lambda *_: False)
    with memory.place().claim(claim_name(0)) as mine:
        assert not mine
    with pytest.raises(ColdstillError, match="its lock comes and goes; try again"):
        memory.place().lock().__enter__()


def test_a_writer_that_lost_a_claim_writes_nothing_more_of_it(memory: Distance) -> None:
    place = memory.place()
    with ShardWriter(f"{memory.url}/store", MANIFEST, shared=True) as writer:
        with writer.claim(0) as mine:
            assert mine
            lease = writer.place._leases._held[-1]  # type: ignore[attr-defined]
            place.remove(claim_name(0))
            heir = lease_of_another(memory, claim_name(0))
            lease.renew()  # what the thread does every minute
            with pytest.raises(ColdstillError, match="it is written by process 7 on far, since"):
                writer.write(0, FIRST)
        assert place.names("shards") == set()
        with writer.claim(0) as mine:
            assert not mine
        with writer.claim(1) as mine:  # the others are still its own
            assert mine
            writer.write(1, BLOCK.take(np.arange(4, 8)))
    assert place.names("shards") == {"00001.arrow", "00001.json"}
    heir.release()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ColdstillError("the network is down")])
def test_what_was_taken_but_not_confirmed_is_given_back(
    memory: Distance, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Lease, *, wait: bool) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_confirm", fail)
        with pytest.raises(type(error)):
            memory.place().claim(claim_name(0)).__enter__()
    assert names(memory) == set()


def test_clearing_takes_what_the_dead_left_and_no_more(memory: Distance) -> None:
    place = memory.place()
    held = [
        lease_of_another(memory, claim_name(0), silent=LONG_AGO),
        lease_of_another(memory, f"{MEMBERS}1", silent=LONG_AGO),
        lease_of_another(memory, claim_name(1)),
    ]
    place.write(f"{CLAIMS}/00007", b"")  # of a disk from where the store was copied
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


def test_what_is_no_claim_of_ours_is_named(memory: Distance) -> None:
    memory.place().write(claim_name(0), b'{"sealed": "by nobody"}')
    with pytest.raises(DamageError) as caught:
        memory.place().claim(claim_name(0)).__enter__()
    said = f"{memory.url}/store/{claim_name(0)}: no lock of ours; delete it if nobody writes"
    assert str(caught.value) == said


def test_a_claim_that_arrives_damaged_is_asked_for_again(s3: Distance) -> None:
    holder = lease_of_another(s3, claim_name(0))
    s3.network.spoil("flipped", rf"GET .*{claim_name(0)}", times=1)
    found = holder_of(s3.place()._objects, claim_name(0))
    assert found is not None
    assert found.token == holder._mine.token
    assert json.loads(s3.place().read(claim_name(0)))["host"] == "far"
    holder.release()
