"""A sweep on a Ray cluster: points are trained side by side, each by one worker."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError, first_line
from ....stages.report import Report, silent
from ..students import missing_students, train_students
from .cluster import at_worker, cause, connected, expect_reachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...recipe.work import Work
    from .cluster import Pool

_WAIT = 0.5
"""Seconds between two looks for SIGTERM."""
_RETRIES = 10
"""Most times that a point is trained again because its worker was lost."""


def train_points(work: Work, names: Sequence[str], new_name: str, pool: Pool) -> dict[str, str]:
    """Train the named students that are missing; parameters and result as `train_students`.

    Ray trains a student again if its worker is lost; it continues from its last checkpoint.

    Raises
        ColdstillError: as `train_students`, or there is no cluster
        StoppedError: SIGTERM arrived; checkpoints are kept
    """
    from ....stages.interruption import Interruption

    if pool.gpus is not None and pool.gpus > 1:
        raise ColdstillError(
            f"--gpus-per-worker: {pool.gpus}, and a point of a sweep trains on one GPU; to train a "
            "student on several, start train-student with torchrun"
        )
    expect_reachable(pool)
    missing = missing_students(work, names, new_name)
    if not missing:
        return {}
    interruption = Interruption()
    left_out: dict[str, str] = {}
    with connected(pool) as ray, interruption.listening(), interruption.postponed():
        train = ray.remote(_train).options(**pool.needs(ray), max_retries=_RETRIES)
        sent = dataclasses.replace(work, report=silent)
        waiting, running = deque(missing), dict[Any, str]()
        work.report(Report(stage="sweep", total=len(missing), unit="points"))
        while (waiting or running) and not interruption.asked:
            while waiting and len(running) < pool.workers:
                name = waiting.popleft()
                call = train.remote(sent, os.getcwd(), name, new_name, pool.cpus)
                running[call] = name
            for call in ray.wait([*running], timeout=_WAIT)[0]:
                name = running.pop(call)
                try:
                    found, reports = ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    raise cause(error) from error
                except ray.exceptions.RayError as error:
                    raise ColdstillError(
                        f"--ray: the worker that trained {name} was lost again and again: "
                        f"{first_line(error)}; see Ray's logs, then run the same command again"
                    ) from error
                left_out |= found
                for report in reports:
                    work.report(report)
                done = len(missing) - len(waiting) - len(running)
                work.report(
                    Report(stage="sweep", done=done, total=len(missing), step=1, unit="points")
                )
        for call in running:
            ray.cancel(call)
    return left_out


def _train(
    work: Work, folder: str, name: str, new_name: str, threads: int
) -> tuple[dict[str, str], list[Report]]:
    """Train one student in a worker; returns it if it was left out, and the notes."""
    notes: list[Report] = []

    def report(report: Report) -> None:
        if report.note and (report.warning or report.stage != "sweep"):
            notes.append(report)

    here = at_worker(work, folder, report, threads)
    return train_students(here, [name], new_name=new_name, go_on=True), notes
