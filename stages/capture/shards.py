"""The capture loop: claim a shard, run its batches, and write it while the next shard runs.

One thread reads sequences ahead of the model; others encode and write its targets. Processes on any
number of machines divide the shards by claims and never wait for one another. The bytes of a shard
depend only on the manifest, its sequences and the size of a batch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...data.schema import Block, Sequences
from ..ranks import rank, world_size
from ..report import Report
from .batches import batches_of, consecutive_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future
    from types import TracebackType

    from numpy.typing import NDArray

    from ...data.schema import Capture
    from ...data.store.writer import EncodedBlock, ShardWriter
    from ..report import Reporter
    from .forward import Begun, Forward, Waiting
    from .plan import CapturePlan
    from .teacher import AnyTeacher

_Item = TypeVar("_Item")
ShardSource = Iterator[tuple[int, contextlib.ExitStack]]
"""Shards to capture, each with what is closed once it is committed."""


class Background:
    """Runs tasks on threads. A context manager; leaving it waits until all tasks are done.

    An error in a task is raised by a later `submit`, or when the context is left. Tasks that have
    not started by then are skipped.
    """

    def __init__(self, workers: int, waiting: int = 2) -> None:
        """Use `workers` threads; `submit` blocks while `waiting` more tasks are queued."""
        self._executor = ThreadPoolExecutor(workers, "coldstill")
        self._limit = workers + waiting
        self._tasks: deque[Future[object]] = deque()
        self._failed = threading.Event()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for all submitted tasks, also after an interruption: they are few and worth keeping.

        Then raise the error of a task, unless another error is being raised already.
        """
        self._executor.shutdown(wait=True)
        if error is None:
            for task in self._tasks:
                task.result()

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task; block while too many are waiting. Raises the error of an earlier task."""
        while self._tasks and (self._failed.is_set() or len(self._tasks) >= self._limit):
            self._tasks.popleft().result()
        self._tasks.append(self._executor.submit(self._run, task))

    def _run(self, task: Callable[[], object]) -> None:
        if not self._failed.is_set():
            try:
                task()
            except BaseException:
                self._failed.set()
                raise


def ahead(items: Iterator[_Item], depth: int = 2) -> Generator[_Item, None, None]:
    """Items in order, made on a thread up to `depth` in advance; raises the error of making one.

    Closing the generator stops the thread.
    """
    end = object()
    executor = ThreadPoolExecutor(1, "coldstill ahead")
    try:
        waiting = deque(executor.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(executor.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_MOST_WORKERS = 4


@dataclass(slots=True)
class Tally:
    """Numbers of tokens, without padding."""

    done: int = 0
    """Tokens captured by this process."""
    total: int = 0
    """Tokens left to this process at the start, minus those that other processes take."""


class ShardCapture:
    """A claimed shard, from its first batch to its commit record."""

    def __init__(
        self, shard: int, writer: ShardWriter, sequences: Sequences, held: contextlib.ExitStack
    ) -> None:
        """Wait for the targets of `sequences`. `held` is closed when the shard is committed."""
        self._shard, self._writer, self._held = shard, writer, held
        self._ids_N = sequences.ids
        self._sizes = writer.manifest.block_sizes(shard)
        self._ends = np.cumsum(self._sizes)
        self._waiting: list[list[Block]] = [[] for _ in self._sizes]
        self._encoded: list[EncodedBlock | None] = [None] * len(self._sizes)
        self._left = len(self._sizes)
        self._lock = threading.Lock()

    def take(self, pending: Waiting, capture: Capture) -> None:
        """Add the targets of a batch. Encode blocks and commit the shard as they are completed.

        Several threads may call this at the same time.
        """
        batch = Block(sequences=pending.sequences, targets=pending.targets(), capture=capture)
        for number, block in self._completed(batch):
            encoded = self._writer.encode(block)
            with self._lock:
                self._encoded[number] = encoded
                self._left -= 1
                whole = self._left == 0
            if whole:
                self._writer.commit(self._shard, (e for e in self._encoded if e is not None))
                self._encoded = []
                self._held.close()

    def _completed(self, batch: Block) -> list[tuple[int, Block]]:
        """The blocks that this batch completes, in the order of the shard."""
        place_B = np.searchsorted(self._ids_N, batch.sequences.ids)
        block_B = np.searchsorted(self._ends, place_B, side="right")
        complete = []
        for number in np.unique(block_B).tolist():
            part = batch.take(np.flatnonzero(block_B == number))
            with self._lock:
                parts = self._waiting[number]
                parts.append(part)
                if sum(len(p) for p in parts) < self._sizes[number]:
                    continue
                self._waiting[number] = []
            block = Block.concatenate(parts)
            complete.append((number, block.take(np.argsort(block.sequences.ids, kind="stable"))))
        return complete


class ShardQueue:
    """The shards that this process captures, and their batches."""

    def __init__(
        self,
        plan: CapturePlan,
        writer: ShardWriter,
        forward: Forward,
        tally: Tally,
        *,
        padded: bool,
        source: ShardSource | None,
    ) -> None:
        """Name the shards.

        padded  whether prompts of different lengths are answered together
        source  the shards that another process gives to this one; if None, this process claims them
        """
        self._source = source
        self._batches = consecutive_batches if padded else batches_of
        self._plan, self._writer, self._forward, self._tally = plan, writer, forward, tally
        self._open = contextlib.ExitStack()
        self._elsewhere: set[int] = set()

    def batches(self) -> Iterator[tuple[ShardCapture, Sequences | Begun]]:
        """Batches of one shard after the other: prepared sequences, or prompts without answers."""
        generate = self._plan.generate
        for shard, held in self._source or self._claims():
            sequences = self._plan.sequences.read(self._rows(shard))
            current = ShardCapture(shard, self._writer, sequences, held)
            lengths_N = self._plan.most_tokens(sequences)
            for places in self._batches(lengths_N, self._forward.budget):
                part = sequences.take(places)
                yield current, part if generate is not None else self._forward.prepare(part)

    def close(self) -> None:
        self._open.close()

    def _claims(self) -> Iterator[tuple[int, contextlib.ExitStack]]:
        taken: set[int] = set()
        while True:
            before = len(taken)
            missing, is_old = set(self._writer.missing()), False
            for shard in _order(missing - taken):
                if shard not in missing:
                    self._count(shard, mine=False)
                    continue
                held = contextlib.ExitStack()
                mine = held.enter_context(self._writer.claim(shard))
                self._count(shard, mine=mine)
                if mine:
                    taken.add(shard)
                    self._open.callback(held.close)  # closing twice is harmless
                    yield shard, held
                    is_old = True
                    continue
                # another process has claimed or finished it
                held.close()
                if is_old:  # one listing instead of a claim for each shard that others finished
                    missing, is_old = set(self._writer.missing()), False
            # another process may have released a shard since
            if len(taken) == before:
                return

    def _count(self, shard: int, *, mine: bool) -> None:
        tokens = len(self._rows(shard)) * self._plan.sequence_length
        if not mine and shard not in self._elsewhere:
            self._tally.total -= tokens
            self._elsewhere.add(shard)
        elif mine and shard in self._elsewhere:
            self._tally.total += tokens
            self._elsewhere.remove(shard)

    def _rows(self, shard: int) -> NDArray[np.int64] | range:
        rows = self._writer.manifest.shard_rows(shard)
        return self._plan.rows[rows.start : rows.stop]


def _order(missing: set[int]) -> list[int]:
    """The shards of this rank, then those of others from the end, which they reach last."""
    own = sorted(shard for shard in missing if shard % world_size() == rank())
    return own + sorted(missing - set(own), reverse=True)


def capture_shards(
    plan: CapturePlan,
    teacher: AnyTeacher,
    writer: ShardWriter,
    forward: Forward,
    report: Reporter,
    stop: Callable[[], bool],
    source: ShardSource | None = None,
) -> Tally:
    """Capture the missing shards that no other process has claimed, until `stop` returns True.

    source  as for `ShardQueue`
    """
    count = sum(len(writer.manifest.shard_rows(i)) for i in writer.missing())
    tally = Tally(total=count * plan.sequence_length)
    padded = plan.generate is not None and teacher.answering == "padded"
    shards = ShardQueue(plan, writer, forward, tally, padded=padded, source=source)
    stage = f"teacher-logits {plan.split}"
    report(Report(stage=stage, total=tally.total))
    try:
        with (
            Background(_workers(forward)) as background,
            contextlib.closing(ahead(shards.batches())) as batches,
        ):
            for shard, batch in batches:
                for prepared in _prepared(plan, teacher, forward, batch, stop):
                    for pending in forward.capture(prepared):
                        background.submit(partial(shard.take, pending, plan.capture))
                if stop():
                    break
                rows = batch if isinstance(batch, Sequences) else batch.sequences
                new = len(rows) * plan.sequence_length
                tally.done += new
                report(Report(stage=stage, done=tally.done, total=tally.total, step=new))
    finally:
        shards.close()
    return tally


def _prepared(
    plan: CapturePlan,
    teacher: AnyTeacher,
    forward: Forward,
    batch: Sequences | Begun,
    stop: Callable[[], bool],
) -> Iterator[Begun]:
    """The batch, prepared. The teacher answers prompts first, which takes minutes on a CPU:
    answers that are not complete when `stop` returns True are dropped."""
    if not isinstance(batch, Sequences):
        yield batch
        return
    longest = int(plan.most_tokens(batch).max())
    ask = partial(teacher.answer, plan, stop=stop)
    for sequences in forward.answered(batch, longest, ask):
        if stop():
            return
        yield forward.prepare(sequences)


def _workers(forward: Forward) -> int:
    """Encoding threads: one on a CPU, which the model needs; several beside an accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_WORKERS, max(1, (cores or 1) // 2)) if forward.pin else 1
