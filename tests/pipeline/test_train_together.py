"""Stage two in several processes, as `torchrun` starts them, and in several runs at once."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.places.claims import claimed
from small_runs import CLOCKS

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in found]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_torchrun_trains_the_student_that_one_process_trains(finished: Desk, sharded: bool) -> None:
    settings = ["--set", "students.n.train.steps=5"]
    if sharded:
        settings += ["--set", 'students.n.train.trainer={ fsdp = "full_shard" }']
    finished.edit("[students.baseline]", '[students.n]\nlike = "small"\n[students.baseline]')
    ended = finished.torchrun("train-student", "r.toml", "--student", "n", *settings)
    assert ended.returncode == 0, ended.stderr
    # Only one of the processes reports; a slow machine repeats lines of progress.
    for sentence in ("kl unbiased with this record", "parameters trained"):
        assert ended.stderr.count(sentence) == 1
    assert "warning" not in ended.stderr.lower()
    alone = (
        "train-student",
        "r.toml",
        "--student",
        "alone",
        "--set",
        "students.alone.train.steps=5",
    )
    finished.edit("[students.baseline]", '[students.alone]\nlike = "small"\n[students.baseline]')
    finished.done(*alone)
    students = finished.run / "students"
    for one, other in zip(lines(students / "n"), lines(students / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)
    finished.done("evaluate", "r.toml")
    figures = [finished.json("students", name, "evaluation.json") for name in ("n", "alone")]
    assert math.isclose(figures[0]["loss"], figures[1]["loss"], rel_tol=1e-5)
    config = finished.json("students", "n", "model", "config.json")
    assert config == finished.json("students", "alone", "model", "config.json")
    assert not list(finished.run.rglob(".training"))


def test_one_run_at_a_time_trains_a_student(finished: Desk) -> None:
    new = ("train-student", "r.toml", "--student", "n", "--set", "students.small.train.steps=2")
    folder = finished.run / "students" / "n"
    with claimed(folder / ".training") as ours:
        assert ours
        line = finished.refused(*new)
    assert line == (
        "error: runs/r/students/n: another process is training this student; wait for it, or "
        "train another under a new name (--student NEW)"
    )
    assert not folder.exists()
    finished.done(*new)
    assert (folder / "model").exists()


def test_sharded_weights_need_several_processes(finished: Desk) -> None:
    sharded = 'students.small.train.trainer={ fsdp = "full_shard" }'
    line = finished.refused("train-student", "r.toml", "--student", "n", "--set", sharded)
    assert "train.trainer: transformers cannot train with these settings: Using fsdp only" in line
    assert not (finished.run / "students" / "n").exists()
