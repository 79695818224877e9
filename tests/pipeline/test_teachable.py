"""Objectives that a store will not support are refused before the teacher works."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from other_tokens import PAIRS, add_students, model_of
from spellings import byte_pairs

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

COMMANDS = ("plan", "teacher-logits", "run")
NO_HEAD = ("--set", "logits.head=0")
INSIDE = "labels_inside is for stores with a student's tokens; in this one the teacher's"
TEMPERATURE = "kl: temperature 2.0 was not captured (captured: 1.0)"
ROUNDS = "rounds = { count = 2, objective = { %s } }"


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ("objective = { reverse_kl = 1.0 }", NO_HEAD, "objective: reverse_kl: reverse KL needs"),
        ("objective = { jsd = 1.0 }", NO_HEAD, "objective: jsd: "),
        ("objective = { skew_kl = 1.0 }", NO_HEAD, "objective: skew_kl: skewed KL needs"),
        ("objective = { residual_to_label = 1.0 }", NO_HEAD, "objective: residual_to_label: it"),
        ("objective = { temperature = 2.0 }", (), f"objective: {TEMPERATURE}"),
        (
            "objective = { chunk_likelihood = 1.0, kl = 0.0, temperature = 2.0 }",
            (),
            "objective: chunk_likelihood: temperature 2.0 was not captured",
        ),
        (
            "objective = { cross_entropy = 1.0, labels_inside = true }",
            (),
            f"objective: cross_entropy: {INSIDE}",
        ),
        ("objective = { kl = 0.0 }", (), "objective: all weights are 0, so there is nothing"),
        (
            'objective = { kl = { weight = 0, start = 1, schedule = "linear" } }\n'
            "train = { steps = 1, batch_tokens = 256 }",
            (),
            "objective: all weights are 0 in the only step",
        ),
        (ROUNDS % "jsd = 1.0", NO_HEAD, "rounds.objective: jsd: "),
        (ROUNDS % "temperature = 2.0", (), f"rounds.objective: {TEMPERATURE}"),
    ],
)
def test_what_the_store_will_not_support_is_refused_before_it_is_made(
    desk: Desk, lines: str, settings: tuple[str, ...], message: str
) -> None:
    add_students(desk, f'like = "small"\n{lines}')
    for command in COMMANDS:
        line = desk.refused(command, "r.toml", *settings)
        assert line.startswith(f"error: students.a.{message}"), command


@pytest.mark.parametrize("family", ["mamba", "lfm3"])
def test_branches_for_a_recurrent_student_are_refused_before_the_teacher_works(
    desk: Desk, family: str
) -> None:
    model_of(desk.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>", family)
    table = "objective = { kl = 1.0, branches = 1.0 }"
    add_students(desk, f'like = "small"\nmodel = "./other"\n{table}')
    for command in COMMANDS:
        line = desk.refused(command, "r.toml", "--set", "corpus.pack=false")
        assert line == (
            f"error: students.a.objective: a {family!r} model does not read branches as it reads a "
            "text, so it cannot learn from them; take branches out of the objective"
        )
    desk.edit(table, "objective = { kl = 1.0 }")
    desk.done("plan", "r.toml", "--set", "corpus.pack=false")


def test_students_with_other_tokens_are_refused_what_their_own_store_will_not_support(
    desk: Desk,
) -> None:
    model_of(desk.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    add_students(
        desk, 'like = "small"\nmodel = "./other"\nobjective = { kl = 1.0, temperature = 2.0 }'
    )
    kept = ("--set", "logits.temperatures=[2.0]")
    for command in COMMANDS:
        line = desk.refused(command, "r.toml", *kept)
        assert line.startswith(
            "error: students.a.objective: kl: temperature 2.0 is not known in a student's own"
        )
    desk.edit("temperature = 2.0", "cross_entropy = 1.0, labels_inside = true")
    desk.done("plan", "r.toml", *kept)
    # a teacher's machine may lack the student's model, and then only what it has is judged
    shutil.rmtree(desk.root / "other")
    desk.edit('model = "./other"', 'model = "nobody/nothing"')
    desk.done("plan", "r.toml", *kept)
    desk.edit("labels_inside = true", "reverse_kl = 1.0")
    line = desk.refused("plan", "r.toml", *kept, *NO_HEAD)
    assert line.startswith("error: students.a.objective: reverse_kl: reverse KL needs")


@pytest.mark.slow
def test_a_complete_store_is_still_reported_beside_a_student_that_it_does_not_support(
    finished: Desk,
) -> None:
    add_students(finished, 'like = "small"\nobjective = { temperature = 2.0 }')
    assert TEMPERATURE in finished.refused("plan", "r.toml")
    assert "complete: " in finished.done("teacher-logits", "r.toml").stderr
