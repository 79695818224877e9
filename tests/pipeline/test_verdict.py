"""The sentence that a report begins with: what it says of every outcome."""

from __future__ import annotations

from typing import Any

import pytest
from coldstill.pipeline.results.verdict import (
    Upbringing,
    baseline_of,
    best_taught,
    export_sentence,
    standing,
    verdict,
)

SMALL = {"architecture": {"layers": 2}}
LONG = {"steps": 40}


def row(name: str, loss: float, parameters: int = 270, **more: Any) -> dict[str, Any]:
    speed = {"machine": "2 CPU threads", "heldout": "f00d"}
    own = {"role": "student", "parameters": parameters, "loss": loss}
    return {"name": name, **speed, **own, **more}


def teacher(**more: Any) -> dict[str, Any]:
    return row("teacher", 4.9, 1000, role="teacher", **more)


def writes(milliseconds: float) -> dict[str, Any]:
    speeds = [{"batch": 8, "token_seconds": 9.0}, {"batch": 1, "token_seconds": milliseconds / 1e3}]
    return {"generation": speeds}


def raised(listens: bool, origin: Any = SMALL, train: Any = LONG) -> Upbringing:
    return Upbringing(listens=listens, origin=origin, train=train)


PAIR = {"small": raised(True), "bare": raised(False)}


def said(*rows: dict[str, Any], students: dict[str, Upbringing] | None = None) -> str:
    first = [] if rows and rows[0]["role"] == "teacher" else [teacher()]
    return verdict([*first, *rows], PAIR if students is None else students)


def test_all_of_it_in_one_sentence() -> None:
    sentence = said(
        teacher(**writes(8.1)), row("small", 4.9973, **writes(3.0)), row("bare", 5.5245)
    )
    assert sentence == (
        "`small` has 27% of the teacher's parameters, writes 2.7 times as fast and keeps held-out "
        "loss within 0.10 nats of it; without the teacher the same model ends 0.62 nats away."
    )


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (4.9049, "matches its held-out loss of 4.90 nats"),
        (4.91, "keeps held-out loss within 0.01 nats of it"),
        (5.004, "keeps held-out loss within 0.11 nats of it"),
        (5.15, "keeps held-out loss within 0.25 nats of it"),
        (5.16, "ends 0.26 nats above it in held-out loss"),
        (4.8, "ends 0.10 nats below it in held-out loss"),
    ],
)
def test_nearness_to_the_teacher_is_told_and_within_holds(loss: float, words: str) -> None:
    assert f"of the teacher's parameters and {words}; " in said(row("small", loss), row("bare", 9))


@pytest.mark.parametrize(
    ("small", "bare", "end"),
    [
        (5.0, 5.5, "; without the teacher the same model ends 0.60 nats away."),
        (5.0, 5.0049, "; without the teacher the same model ends as well, so here the teacher did"),
        (5.0, 4.95, "; but without the teacher the same model ends 0.05 nats lower, so here the"),
        # where the student is past the teacher, so may the baseline be: told from the student
        (4.5, 4.8, "; without the teacher the same model ends 0.30 nats higher."),
        (4.5, 5.0, "; without the teacher the same model ends 0.50 nats higher."),
    ],
)
def test_what_the_teacher_is_worth_is_told_whichever_way_it_went(
    small: float, bare: float, end: str
) -> None:
    assert end in said(row("small", small), row("bare", bare))


def test_a_baseline_trained_otherwise_is_told_as_such_and_only_taken_for_want_of_another() -> None:
    students = {**PAIR, "longer": raised(False, train={"steps": 80})}
    rows = [row("small", 5.0), row("bare", 5.5), row("longer", 5.3)]
    assert "the same model ends 0.60 nats away" in said(*rows, students=students)
    without = said(rows[0], rows[2], students=students)
    assert "without the teacher the same model, though trained with other settings, ends" in without


def test_a_baseline_is_of_the_same_origin() -> None:
    other = {"small": raised(True), "bare": raised(False, origin={"layers": {"every": 2}})}
    rows = [teacher(), row("small", 5.0), row("bare", 5.5)]
    end = "What the teacher is worth to it is not known: no student of the same kind was trained"
    assert end in verdict(rows, other)
    assert baseline_of(rows[1], rows, other) is None
    assert baseline_of(rows[1], rows, PAIR) is rows[2]
    unknown = {name: raised(name == "small", origin={}) for name in PAIR}
    assert baseline_of(rows[1], rows, unknown) is None
    rows[2]["heldout"] = "beef"
    assert baseline_of(rows[1], rows, PAIR) is None


def test_of_several_the_best_is_told_and_exports_are_no_students() -> None:
    students = {"a": raised(True), "b": raised(True), "bare": raised(False)}
    rows = [row("b (int8)", 4.9), row("b", 5.0), row("a", 5.1), row("bare", 4.99)]
    assert best_taught(rows, students) is rows[1]
    assert said(*rows, students=students).startswith("The best of 2 taught students, `b`, has 27%")


def test_where_the_best_has_no_baseline_the_teachers_worth_is_told_of_one_that_has() -> None:
    students = {**PAIR, "pruned": raised(True, origin={"prune": {"layers": 1}})}
    rows = [row("pruned", 4.95), row("small", 5.1), row("bare", 5.5)]
    sentence = said(*rows, students=students)
    assert sentence.startswith("The best of 2 taught students, `pruned`, has 27%")
    assert sentence.endswith(
        " nats of it. What the teacher is worth shows in `small`: without it the same model ends "
        "0.40 nats higher."
    )
    pair = standing(rows, students)
    assert pair is not None
    assert [one and one["name"] for one in (pair.best, pair.compared, pair.baseline)] == [
        "pruned", "small", "bare",
    ]  # fmt: skip
    rows[2]["loss"] = 5.101
    end = "Without the teacher the same model as `small` ends as well, so there it did not help."
    assert said(*rows, students=students).endswith(end)
    rows[2]["loss"] = 5.0
    assert "`small` ends 0.10 nats lower, so there it did not help." in said(
        *rows, students=students
    )
    assert standing(rows[2:], students) is None


def export(of: str, name: str, bytes_: int, kl: float, **more: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "role": "export",
        "of": of,
        "format": name,
        "bytes": bytes_,
        "kl_from_student": kl,
    }
    return row(f"{of} ({name})", 5.0, **own, **more)


def test_what_an_export_wins_is_told() -> None:
    small = row("small", 5.0, bytes=1000, **writes(2.0))
    hf = export("small", "hf", 1000, 0.0, **writes(2.0))
    onnx = export("small", "onnx", 990, 1e-9, **writes(1.0))
    tiny = export("small", "onnx-int8", 280, 0.0068, **writes(1.9))
    rows = [teacher(), small, hf, onnx, tiny]
    assert export_sentence(rows, "small") == (
        "Exported as onnx-int8, `small` takes 28% of its bytes, writes 1.1 times as fast and is "
        "0.007 nats of KL away from it."
    )
    # nothing is smaller: the fastest, where it is faster at all
    assert export_sentence(rows[:-1], "small") == (
        "Exported as onnx, `small` writes 2.0 times as fast and says the same."
    )
    assert export_sentence(rows[:3], "small") == ""
    assert export_sentence(rows[:2], "small") == ""
    # of the best, and of another only where that has none
    bare = row("bare", 5.5, bytes=1000)
    other = [*rows, bare, export("bare", "gguf-q8_0", 300, 0.1)]
    assert "`bare` takes 30%" in export_sentence(other, "bare")
    assert "`small` takes" in export_sentence(other, "gone")
    tiny["generation"] = []  # its runtime was not there
    assert "takes 28% of its bytes and is 0.007 nats" in export_sentence(rows, "small")


def test_a_run_in_which_nobody_listened_says_so() -> None:
    sentence = said(row("bare", 5.5))
    assert sentence == (
        "No student that learned from the teacher is evaluated; the best of those without one, "
        "`bare`, has 27% of the teacher's parameters and ends 0.60 nats above it in held-out loss."
    )
    assert said() == "No student is evaluated yet."


def test_figures_of_different_stores_are_not_held_against_each_other() -> None:
    apart = said(row("small", 5.0, heldout="beef"), row("bare", 5.5))
    assert apart.startswith("Teacher and taught students were measured on different held-out")
    sentence = said(row("small", 5.0, heldout="beef"))
    assert sentence.startswith("Teacher and students were measured on different held-out stores")
    assert "within 0.10 nats" in said(row("small", 5.0, heldout=None), row("bare", 5.5))


@pytest.mark.parametrize(
    ("own", "theirs", "words"),
    [
        (writes(2.0), writes(2.0), "writes about as fast"),
        (writes(4.0), writes(2.0), "writes at 50% of its speed"),
        (writes(0.1), writes(2.0), "writes 20 times as fast"),
        ({}, writes(2.0), None),
        ({"generation": []}, writes(2.0), None),
        ({**writes(1.0), "machine": "another"}, writes(2.0), None),
        ({**writes(1.0), "machine": ""}, {**writes(2.0), "machine": ""}, None),
    ],
)
def test_speed_is_told_where_it_was_measured_on_one_machine(
    own: dict[str, Any], theirs: dict[str, Any], words: str | None
) -> None:
    sentence = said(teacher(**theirs), row("small", 5.0, **own), row("bare", 5.5))
    if words is None:
        assert "parameters and keeps" in sentence
    else:
        assert f"parameters, {words} and keeps" in sentence


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (1000, "has as many parameters as the teacher"),
        (2000, "has 2.0 times the teacher's parameters"),
        (95, "has 9.5% of the teacher's parameters"),
        (4, "has 0.4% of the teacher's parameters"),
    ],
)
def test_size_is_told_in_words_that_fit(parameters: int, words: str) -> None:
    assert f"`small` {words} and keeps" in said(row("small", 5.0, parameters), row("bare", 5.5))
