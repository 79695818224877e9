"""Iterated pruning: cut, recover, cut the recovered model again, recover.

Each round but the last has a folder of its own in the student's (`rounds/1`, ...), laid out as any
student's; the last one is the student itself. Models of rounds are deleted when its training ends,
but for their metrics and what is told of their cuts.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .origin import StudentJob

ROUNDS = "rounds"


def rounds_of(job: StudentJob) -> list[StudentJob]:
    """The trainings that a student takes, in order: one, or one for each cut."""
    count = len(job.prune)
    if count < 2:
        return [job]
    folders = [job.folder / ROUNDS / str(number) for number in range(1, count)]
    found: list[StudentJob] = []
    for number, folder in enumerate([*folders, job.folder], 1):
        found.append(
            replace(
                job,
                round=number,
                folder=folder,
                prune=job.prune[number - 1 :],  # those to come must be possible too
                recovered=found[-1].model_folder if found else None,
            )
        )
    return found


def rounds_to_go(job: StudentJob) -> list[StudentJob]:
    """From the last one that was begun on: those before it are done, and may be deleted."""
    rounds = rounds_of(job)
    begun = [
        number
        for number, each in enumerate(rounds)
        if each.start.is_dir() or each.model_folder.is_dir()
    ]
    return rounds[max(begun, default=0) :]


def forget_rounds(job: StudentJob) -> None:
    """Delete the models of a student's rounds, now that its last training has ended; keep what is
    told of them."""
    for folder in (job.folder / ROUNDS).glob("*/*/"):
        shutil.rmtree(folder, ignore_errors=True)
