"""Stage one on a Ray cluster: this process gives shards to workers and shows their progress.

Ray places the workers and starts them again elsewhere if they are lost. The driver holds the claim
of each shard that it has given away. So the claim outlives a lost worker, the shard goes to another
one at once, and other commands can still fill the same store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ....data.errors import ColdstillError, first_line
from ....data.places.place import place_at
from ....data.store.layout import MANIFEST, commit_name
from ....stages.config import SERVER_KEY
from ....stages.report import Report, silent
from ..capture import capture_base, plans_for
from .cluster import Pool, cause, connected, expect_reachable, needs_text
from .worker import Worker

if TYPE_CHECKING:
    from ....data.store.writer import ShardWriter
    from ....stages.capture.plan import CapturePlan
    from ....stages.interruption import Interruption
    from ...recipe.work import Work
    from ..capture import CaptureBase
    from .worker import Ending, Loaded, Turn

_WAIT = 0.5
"""Seconds between two looks for SIGTERM."""
_PATIENCE = 30.0
"""Seconds until the driver says that it waits for a place for its first worker."""
_LOSSES = 3
"""Times that each worker may be lost while no shard is committed; then something is wrong."""
STAGE = "teacher-logits"


def teacher_logits(work: Work, pool: Pool, *, other_engine: bool = False) -> None:
    """Run the teacher over both splits in the workers of a Ray cluster.

    other_engine  continue stores that another engine of the teacher began

    Raises
        ColdstillError: the recipe splits its teacher across processes, Ray is not installed, there
            is no cluster, or too many workers are lost
        StoppedError: SIGTERM arrived; finished shards are kept
    """
    from ....stages.interruption import Interruption

    if work.recipe.teacher.tensor_parallel:
        raise ColdstillError(
            "teacher.tensor_parallel: its processes start together, which Ray does not do; start "
            'them with torchrun, or set teacher.device_map = "auto" and --gpus-per-worker'
        )
    expect_reachable(pool)
    interruption = Interruption()
    with interruption.listening():
        base = capture_base(work, other_engine=other_engine)
        if base.is_complete(work):
            return
    # Ray handles SIGTERM itself once it is connected, so listening begins again.
    with connected(pool) as ray, interruption.listening(), interruption.postponed():
        workers = _Workers(work, pool, ray, interruption, base)
        try:
            isolation = workers.first_isolation()
            if isolation is not None:
                plans = plans_for(work, base, isolation)
                work.begin()
                for plan in reversed(plans):
                    if not interruption.asked:
                        workers.capture(plan, isolation)
        finally:
            workers.close()


@dataclass(slots=True, eq=False)
class _Worker:
    """What the driver knows of one worker."""

    number: int
    actor: Any
    pending: Any
    """The call that it has not answered."""
    state: Literal["placing", "loading", "ready"] = "placing"
    node: str = ""
    loaded: Loaded | None = None
    split: str = ""
    """The split that it captures; empty if it has left the last one."""
    given: dict[int, contextlib.ExitStack] = field(default_factory=dict)
    """Claims of the shards that it has and that are not in the store yet."""
    tokens: int = 0
    """Tokens of these shards that it has captured."""


class _Workers:
    """The workers of one command."""

    def __init__(
        self, work: Work, pool: Pool, ray: Any, interruption: Interruption, base: CaptureBase
    ) -> None:
        self._work, self._ray, self._interruption = work, ray, interruption
        self._needs = pool.needs(ray)
        options: dict[str, Any] = {}
        if work.recipe.teacher.url is not None:  # the work is the server's
            self._needs["num_gpus"] = pool.gpus or 0
            kept = {name: os.environ[name] for name in (SERVER_KEY,) if name in os.environ}
            options = {"runtime_env": {"env_vars": kept}}
        self._begun, self._losses, self._said = time.monotonic(), 0, False
        self._split = ""
        sent = dataclasses.replace(work, report=silent)
        made = ray.remote(Worker).options(
            **self._needs,
            **options,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=1,
        )
        self._all = []
        for number in range(1, pool.workers + 1):
            actor = made.remote(
                sent, os.getcwd(), base.checked, pool.cpus, other_engine=base.other_engine
            )
            self._all.append(_Worker(number, actor, _place(actor)))
        count = "1 worker" if pool.workers == 1 else f"{pool.workers} workers"
        work.doing(STAGE, f"start {count} with {needs_text(self._needs)} each")

    def first_isolation(self) -> Any:
        """Wait for the first worker; returns its teacher's isolation, or None after SIGTERM."""
        while not self._interruption.asked:
            self._look()
            for worker in self._all:
                if worker.loaded is not None:
                    return worker.loaded.isolation
        return None

    def close(self) -> None:
        """End all workers, and give back their claims."""
        for worker in self._all:
            self._ray.kill(worker.actor)
            for claim in worker.given.values():
                claim.close()

    def capture(self, plan: CapturePlan, isolation: Any) -> None:
        """Capture the missing shards of a split, until SIGTERM."""
        from ....data.store.writer import ShardWriter
        from ....stages.capture.plan import make_manifest
        from ....stages.teacher_logits import is_captured

        stage = f"{STAGE} {plan.split}"
        if is_captured(plan):
            self._work.note(stage, f"complete: {place_at(plan.folder)}")
            return
        manifest = make_manifest(plan, isolation)
        writer = ShardWriter(plan.folder, manifest, shared=True, other_engine=plan.other_engine)
        self._split, self._shards = plan.split, _Shards(plan, writer)
        self._shown, self._measuring = 0, 0
        count, missing = writer.manifest.shards, len(self._shards.waiting)
        if missing < count:
            self._work.note(stage, f"continuing: {count - missing} of {count} shards done")
        self._work.report(Report(stage=stage, total=self._shards.total))
        while not self._has_ended():
            for worker in self._look():
                self._next_turn(worker)
            self._show(stage)
        if writer.place.exists(MANIFEST):  # which a worker has written, with what its codec learned
            with writer:  # deletes what lost workers have left
                pass
        left = len(writer.missing())
        if left and not self._measuring and not self._interruption.asked:
            note = f"other commands have claimed the last {left} shards; run this again after them"
            self._work.note(stage, note, warning=True)

    def _has_ended(self) -> bool:
        stops = self._interruption.asked or self._shards.is_done
        for worker in self._all:
            if worker.pending is None and not stops:
                self._next_turn(worker)
        return stops and not any(worker.split for worker in self._all)

    def _look(self) -> list[_Worker]:
        """Wait for answers; returns the workers that can go on."""
        waiting = {w.pending: w for w in self._all if w.pending is not None}
        answered, _ = self._ray.wait([*waiting], timeout=_WAIT) if waiting else ([], [])
        for call in answered:
            worker = waiting[call]
            worker.pending = None
            try:
                self._take(worker, self._ray.get(call))
            except self._ray.exceptions.RayTaskError as error:
                raise cause(error) from error
            except self._ray.exceptions.RayError as error:
                self._lose(worker, error)
        self._say_if_waiting()
        return [waiting[call] for call in answered if waiting[call].pending is None]

    def _take(self, worker: _Worker, answer: Any) -> None:
        if worker.state == "placing":
            worker.node, worker.state = answer, "loading"
            worker.pending = worker.actor.load.remote()
        elif worker.state == "loading":
            worker.loaded, worker.state = answer, "ready"
            self._pass_on(answer.reports)
        else:
            self._take_turn(worker, answer)

    def _take_turn(self, worker: _Worker, turn: Turn) -> None:
        ended = self._shards.is_done
        worker.tokens += sum(report.step for report in turn.reports if not report.note)
        for shard in turn.committed:
            worker.given.pop(shard).close()
            worker.tokens -= self._shards.commit(shard)
            self._losses = 0
        if turn.ended:
            worker.split = ""
        self._pass_on(turn.reports, everything=ended and worker.number == self._measuring)

    def _pass_on(self, reports: list[Report], *, everything: bool = False) -> None:
        """Show the notes of a worker, and the steps of the one that measures."""
        for report in reports:
            counts = not report.doing and report.stage == f"{STAGE} {self._split}"
            if report.note or (everything and not counts):
                self._work.report(report)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Take back the shards of a worker; Ray starts it again where it finds a place."""
        for shard, claim in worker.given.items():
            claim.close()
            self._shards.take_back(shard)
        taken = "; its shards go to others" if worker.given else ""
        note = f"worker {worker.number} on {worker.node or 'no node'} lost{taken}"
        self._work.note(STAGE, note, warning=True)
        worker.given, worker.tokens = {}, 0
        self._losses += 1
        if self._losses > _LOSSES * len(self._all):
            raise ColdstillError(
                f"--ray: {self._losses} workers lost since the last shard: {first_line(error)}; "
                "see Ray's logs of these nodes, then run the same command again"
            )
        worker.state, worker.node, worker.split = "placing", "", ""
        worker.pending = _place(worker.actor)

    def _next_turn(self, worker: _Worker) -> None:
        """Give the worker more shards, or let it leave the split."""
        if worker.state != "ready":
            return
        ending: Ending = "stop" if self._interruption.asked else ""
        if self._shards.is_done and not ending:
            if worker.split:
                self._measuring = self._measuring or worker.number
            ending = "measure" if self._measuring == worker.number else "stop"
        if ending and not worker.split:
            return
        given: list[int] = []
        while not ending and len(worker.given) < self._share(worker):
            claimed = self._shards.next()
            if claimed is None:
                break
            given.append(claimed[0])
            worker.given[claimed[0]] = claimed[1]
        if not (given or worker.split):
            return
        worker.split = self._split
        worker.pending = worker.actor.turn.remote(self._split, given, ending)

    def _share(self, worker: _Worker) -> int:
        """Most shards that a worker holds: a second one while there are enough for all."""
        return 2 if len(self._shards.waiting) >= len(self._all) else 1

    def _show(self, stage: str) -> None:
        done = self._shards.committed + sum(worker.tokens for worker in self._all)
        if done > self._shown:  # the part of a lost worker is done again, and not shown twice
            total, step = self._shards.total, done - self._shown
            figures = {"workers": float(sum(worker.state == "ready" for worker in self._all))}
            self._work.report(
                Report(stage=stage, done=done, total=total, step=step, figures=figures)
            )
            self._shown = done

    def _say_if_waiting(self) -> None:
        waits = all(worker.state == "placing" for worker in self._all)
        if waits and not self._said and time.monotonic() - self._begun > _PATIENCE:
            self._said = True
            self._work.note(
                STAGE,
                f"waiting for the cluster: no place for a worker with {needs_text(self._needs)}; "
                "add nodes, or ask for less",
                warning=True,
            )


def _place(actor: Any) -> Any:
    """Ask where a worker is. Ray asks again while the worker starts; other calls would fail."""
    return actor.place.options(max_task_retries=-1).remote()


class _Shards:
    """The shards of a split that are missing, and the claims of those that are given away."""

    def __init__(self, plan: CapturePlan, writer: ShardWriter) -> None:
        self._plan, self._writer = plan, writer
        self.waiting = deque(writer.missing())
        self._given = 0
        self._elsewhere: set[int] = set()
        """Shards that other commands had claimed."""
        self.committed = 0
        """Tokens in the store that were missing at the start."""
        self.total = sum(map(self._tokens, self.waiting))
        """Tokens that were missing at the start, minus those of other commands."""

    @property
    def is_done(self) -> bool:
        """Whether no shard is left: all are in the store, or another command captures them."""
        return not self.waiting and not self._given

    def next(self) -> tuple[int, contextlib.ExitStack] | None:
        """Claim the next shard; returns it with its claim, or None if none is free."""
        looked: set[int] = set()
        while self.waiting or self._look_elsewhere(looked):
            shard = self.waiting.popleft()
            claim = contextlib.ExitStack()
            if claim.enter_context(self._writer.claim(shard)):
                if shard in self._elsewhere:
                    self._elsewhere.remove(shard)
                    self.total += self._tokens(shard)
                self._given += 1
                return shard, claim
            claim.close()
            looked.add(shard)
            if shard not in self._elsewhere:
                self._elsewhere.add(shard)
                self.total -= self._tokens(shard)
        return None

    def _look_elsewhere(self, looked: set[int]) -> bool:
        """Look again at shards of other commands, which may have been given up."""
        again = self._elsewhere & set(self._writer.missing()) - looked
        self.waiting.extend(sorted(again))
        return bool(again)

    def take_back(self, shard: int) -> None:
        """Make a shard free that a lost worker had, unless it was written before the loss."""
        if self._writer.place.exists(commit_name(shard)):
            self.commit(shard)
        else:
            self._given -= 1
            self.waiting.appendleft(shard)

    def commit(self, shard: int) -> int:
        """Count a shard that is in the store; returns its tokens."""
        self._given -= 1
        tokens = self._tokens(shard)
        self.committed += tokens
        if not self.waiting:
            self._look_elsewhere(set())
        return tokens

    def _tokens(self, shard: int) -> int:
        return len(self._writer.manifest.shard_rows(shard)) * self._plan.sequence_length
