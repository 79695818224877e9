"""Trainings in several parts that are stopped at every point: rounds, cuts, and few bits."""

from __future__ import annotations

import json
import shutil
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.maintenance.verify import verify
from coldstill.pipeline.recipe.work import open_work
from coldstill.pipeline.steps.rounds import finish_rounds
from coldstill.pipeline.steps.students import train_students
from oracles import digests
from safetensors.torch import load_file
from small_students import KilledError

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.report import Report
    from desk import Desk, Processes

pytest_plugins = ("desk",)

ROUNDS = (
    "rounds = { count = 2, prompts = 20, heldout = 10, prompt_tokens = 6, max_new_tokens = 8, "
    "steps = 2 }"
)
CUTS = "prune = [{ feed_forward = 64, sequences = 4 }, { layers = 1, sequences = 4 }]"
PASSING = ("measurements.json", "writing.json", "metrics.jsonl")
"""Files with figures of the clock."""


def with_student(desk: Desk, *lines: str) -> None:
    """Add lines to the only student of a recipe; cuts take the place of its architecture."""
    text = (desk.root / "r.toml").read_text(encoding="utf-8").partition("[students.baseline]")[0]
    if CUTS in lines:
        head, _, rest = text.partition("architecture = ")
        text = head + rest.partition("\n")[2]
    desk.write("r.toml", "\n".join([text.rstrip(), *lines, ""]))


def trained(desk: Desk, last: int | None = None) -> int:
    """Train the student to its end, or stop at a report; returns the number of reports."""
    seen = 0

    def report(_: Report) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            raise KilledError

    work = open_work(desk.root / "r.toml", (), desk.root / "runs", report)
    if work.recipe.student("small").rounds is None:
        train_students(work, ["small"])
    else:
        finish_rounds(work)
    return seen


def results(desk: Desk) -> dict[str, Any]:
    """What a student leaves: its records, texts, scores and weights."""
    student = desk.run / "students" / "small"
    models = [path.parent for path in student.rglob("model.safetensors")]
    weights = [
        (f"{folder.relative_to(student)} {key}", weight)
        for folder in models
        if folder.name == "model"
        for key, weight in load_file(folder / "model.safetensors").items()
    ]
    files = [
        (name, digest)
        for name, digest in digests(student).items()
        if "checkpoints/" not in name
        and not name.endswith((*PASSING, ".safetensors"))
        and not name.startswith(".unfinished-")  # SIGKILL leaves what a process was writing
    ]
    return dict([*weights, *files])


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else (
            value == other[name]
        )  # fmt: skip
        assert same, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        (ROUNDS,),
        (ROUNDS, 'quantize = "int4"'),
        (CUTS, 'quantize = "int8-row"'),
        (CUTS, ROUNDS, 'quantize = "int8-row"'),
    ],
    ids=lambda lines: " ".join(line.split()[0] for line in lines),
)
def test_a_student_that_is_killed_at_any_report_ends_as_if_it_had_not_been(
    desk: Desk, lines: tuple[str, ...], make_desk: type[Desk]
) -> None:
    with_student(desk, *lines)
    desk.done("teacher-logits", "r.toml")
    whole = make_desk(desk.root.with_name(f"{desk.root.name}-whole"))
    shutil.copytree(desk.root, whole.root)
    count = trained(whole)
    kills = 0
    # killed before it wrote its settings
    (desk.run / "students" / "small" / "written" / "1" / "checkpoints").mkdir(parents=True)
    # each run begins where the last one ended, so that later ones are killed in later parts
    for last in np.unique(np.linspace(1, count - 1, 12).astype(int)).tolist():
        try:
            trained(desk, last)
        except KilledError:
            kills += 1
            continue
        break
    trained(desk)
    assert kills > 3
    assert_same(results(desk), results(whole))
    assert not list(desk.run.rglob(".unfinished-*"))
    assert not list(desk.run.rglob(".text-*"))
    student = desk.run / "students" / "small"
    for store in student.glob("written/*/*/manifest.json"):
        assert not list(verify(str(store.parent)))
    grids = [json.loads(one.read_text()) for one in student.rglob("model/quantization.json")]
    scheme = [line.split('"')[1] for line in lines if line.startswith("quantize")]
    assert {one["scheme"] for one in grids} == {*scheme}
    if ROUNDS in lines:
        acts = json.loads(desk.done("rounds", "next", "r.toml", "--json").stdout)
        assert [one["act"] for one in acts] == ["evaluate"]
    shutil.rmtree(whole.root)


@pytest.mark.slow
def test_a_killed_run_with_rounds_continues(
    desk: Desk, processes: Processes, make_desk: type[Desk]
) -> None:
    with_student(desk, ROUNDS)
    desk.done("teacher-logits", "r.toml")
    whole = make_desk(desk.root.with_name(f"{desk.root.name}-whole"))
    shutil.copytree(desk.root, whole.root)
    whole.done("run", "r.toml")
    student = desk.run / "students" / "small"
    first, killed = student / "written" / "1", 0
    signs: list[Path] = [
        first / "checkpoints",  # in the first training
        first / "model",
        first / "text",  # the text is written
        first / "heldout" / "manifest.json",  # in the capture
        first / "logits" / "manifest.json",
        student / "checkpoints",  # in the second training
        student / "model",
        student / "written" / "2" / "text",
    ]
    for sign in signs:
        code, _ = processes.stopped(desk, SIGKILL, sign, "run", "r.toml")
        killed += code == -SIGKILL
    desk.done("run", "r.toml")
    assert killed > 4
    ours, theirs = results(desk), results(whole)
    for found in (ours, theirs):
        del found["evaluation.json"]  # has speeds
    assert_same(ours, theirs)
    assert not list(desk.run.rglob(".text-*"))
    shutil.rmtree(whole.root)
