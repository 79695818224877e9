"""The sentence that a report begins with, for every outcome."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from coldstill.pipeline.results.verdict import (
    Training,
    ahead_sentence,
    baseline_of,
    contest,
    export_sentence,
    verdict,
)
from compared import generation
from compared import row as whole_row

if TYPE_CHECKING:
    from coldstill.pipeline.results.figures import ModelFigures

SMALL = {"architecture": {"layers": 2}}
LONG = {"steps": 40}


def row(name: str, loss: float, parameters: int = 270, **more: Any) -> ModelFigures:
    own = {"generation": [], **more}
    found: ModelFigures = whole_row(name, loss, parameters, **own)
    return found


teacher = functools.partial(row, "teacher", 4.9, 1000, role="teacher")


def writes(milliseconds: float) -> dict[str, Any]:
    one, eight = generation(1000)
    return {"generation": [eight, {**one, "token_seconds": milliseconds / 1e3}]}


def trained(uses_teacher: bool, origin: Any = SMALL, settings: Any = LONG) -> Training:
    return Training(uses_teacher=uses_teacher, origin=origin, settings=settings)


PAIR = {"small": trained(True), "bare": trained(False)}


def result(*rows: ModelFigures, trainings: dict[str, Training] | None = None) -> str:
    first = [] if rows and rows[0].role == "teacher" else [teacher()]
    return verdict([*first, *rows], PAIR if trainings is None else trainings)


def test_one_sentence_holds_the_whole_result() -> None:
    rows = teacher(**writes(8.1)), row("small", 4.9973, **writes(3.0)), row("bare", 5.5245)
    assert result(*rows) == (
        "`small` has 27% of the teacher's parameters, writes 2.7 times as fast and keeps held-out "
        "loss within 0.10 nats of it; without the teacher the same model ends 0.62 nats away."
    )


def test_size_and_distance_are_stated_in_words_that_fit() -> None:
    for parameters, words in (
        (1000, "has as many parameters as the teacher"),
        (2000, "has 2.0 times the teacher's parameters"),
        (95, "has 9.5% of the teacher's parameters"),
        (4, "has 0.4% of the teacher's parameters"),
    ):
        sentence = result(row("small", 5.0, parameters), row("bare", 5.5))
        assert f"`small` {words} and keeps" in sentence
    for loss, words in (  # the distance is rounded up
        (4.9049, "matches its held-out loss of 4.90 nats"),
        (4.91, "keeps held-out loss within 0.01 nats of it"),
        (5.004, "keeps held-out loss within 0.11 nats of it"),
        (5.15, "keeps held-out loss within 0.25 nats of it"),
        (5.16, "ends 0.26 nats above it in held-out loss"),
        (4.8, "ends 0.10 nats below it in held-out loss"),
    ):
        sentence = result(row("small", loss), row("bare", 9))
        assert f"of the teacher's parameters and {words}; " in sentence
    without = "; without the teacher the same model"
    for small, bare, end in (
        (5.0, 5.5, f"{without} ends 0.60 nats away."),
        (5.0, 5.0049, f"{without} reaches the same loss, so here the teacher did"),
        (5.0, 4.95, "; but without the teacher the same model ends 0.05 nats lower, so here the"),
        # the student is better than the teacher: the distance is measured from the student
        (4.5, 4.8, f"{without} ends 0.30 nats higher."),
        (4.5, 5.0, f"{without} ends 0.50 nats higher."),
    ):
        assert end in result(row("small", small), row("bare", bare))
    speeds: tuple[tuple[dict[str, Any], dict[str, Any], str | None], ...] = (
        (writes(2.0), writes(2.0), "writes about as fast"),
        (writes(4.0), writes(2.0), "writes at 50% of its speed"),
        (writes(0.1), writes(2.0), "writes 20 times as fast"),
        ({}, writes(2.0), None),
        ({**writes(1.0), "machine": "another"}, writes(2.0), None),
        ({**writes(1.0), "machine": ""}, {**writes(2.0), "machine": ""}, None),
    )
    for own, theirs, speed in speeds:
        sentence = result(teacher(**theirs), row("small", 5.0, **own), row("bare", 5.5))
        part = "parameters and keeps" if speed is None else f"parameters, {speed} and keeps"
        assert part in sentence
    assert result(row("bare", 5.5)) == (
        "No student that learned from the teacher is evaluated; the best of those without one, "
        "`bare`, has 27% of the teacher's parameters and ends 0.60 nats above it in held-out loss."
    )
    assert result() == "No student is evaluated yet."
    trainings = {"a": trained(True), "b": trained(True), "bare": trained(False)}
    rows = [row("b (int8)", 4.9, role="export"), row("b", 5.0), row("a", 5.1), row("bare", 4.99)]
    sentence = result(*rows, trainings=trainings)  # exports are not students
    assert sentence.startswith("The best of 2 distilled students, `b`, has 27%")


def test_a_baseline_with_other_settings_is_used_only_without_a_better_one() -> None:
    trainings = {**PAIR, "longer": trained(False, settings={"steps": 80})}
    rows = [row("small", 5.0), row("bare", 5.5), row("longer", 5.3)]
    assert "the same model ends 0.60 nats away" in result(*rows, trainings=trainings)
    without = result(rows[0], rows[2], trainings=trainings)
    assert "without the teacher the same model, though trained with other settings, ends" in without


def test_a_baseline_has_the_same_origin_and_held_out_store() -> None:
    other = {"small": trained(True), "bare": trained(False, origin={"layers": {"every": 2}})}
    rows = [teacher(), row("small", 5.0), row("bare", 5.5)]
    end = "The teacher's effect on it is not known: no student of the same kind was trained"
    assert end in verdict(rows, other)
    assert baseline_of(rows[1], rows, other) is None
    assert baseline_of(rows[1], rows, PAIR) is rows[2]
    unknown = {name: trained(name == "small", origin={}) for name in PAIR}
    assert baseline_of(rows[1], rows, unknown) is None
    elsewhere = row("bare", 5.5, heldout="beef")
    assert baseline_of(rows[1], [*rows[:2], elsewhere], PAIR) is None


def test_the_teachers_effect_is_shown_by_a_student_that_has_a_baseline() -> None:
    trainings = {**PAIR, "pruned": trained(True, origin={"prune": {"layers": 1}})}
    pruned, small = row("pruned", 4.95), row("small", 5.1)
    rows = [pruned, small, row("bare", 5.5)]
    sentence = result(*rows, trainings=trainings)
    assert sentence.startswith("The best of 2 distilled students, `pruned`, has 27%")
    assert sentence.endswith(
        " nats of it. The teacher's effect is known for `small`: without the teacher the same "
        "model ends 0.40 nats higher."
    )
    pair = contest(rows, trainings)
    assert pair is not None
    assert [pair.best, pair.compared, pair.baseline] == rows
    for loss, end in (
        (5.101, "Without the teacher the same model as `small` reaches the same loss, so there"),
        (5.0, "`small` ends 0.10 nats lower, so there it did not help."),
    ):
        assert end in result(pruned, small, row("bare", loss), trainings=trainings)
    assert contest(rows[2:], trainings) is None


def test_every_student_that_ends_above_its_baseline_is_named() -> None:
    wide = {"architecture": {"layers": 9}}
    trainings = PAIR | {"wide": trained(True, wide), "wide_bare": trained(False, wide)}
    rows = [teacher(), row("small", 5.0), row("bare", 5.2), row("wide", 5.4), row("wide_bare", 5.3)]
    assert ahead_sentence(rows, trainings) == (
        "Without a teacher, `wide_bare` ends 0.10 nats below `wide` in held-out loss."
    )
    # the verdict tells it of the best student
    ahead = [teacher(), row("small", 5.0), row("bare", 4.95), *rows[3:]]
    assert "ends 0.05 nats lower, so here the teacher did not help" in verdict(ahead, trainings)
    assert ahead_sentence(ahead[:3], PAIR) == ""
    assert ahead_sentence(ahead, trainings) == ahead_sentence(rows, trainings)
    longer = trainings | {"wide_bare": trained(False, wide, {"steps": 80})}
    assert "`wide_bare`, though trained with other settings, ends" in ahead_sentence(rows, longer)
    same = [*rows[:4], row("wide_bare", 5.398)]
    assert ahead_sentence(same, trainings) == ahead_sentence(same[:4], trainings) == ""


def export(of: str, name: str, bytes_: int, kl: float, **more: Any) -> ModelFigures:
    own: dict[str, Any] = {"role": "export", "of": of, "format": name, "kl_from_student": kl}
    return row(f"{of} ({name})", 5.0, bytes=bytes_, **own, **more)


def test_the_gain_of_an_export_is_stated() -> None:
    small = row("small", 5.0, bytes=1000, **writes(2.0))
    hf = export("small", "hf", 1000, 0.0, **writes(2.0))
    onnx = export("small", "onnx", 990, 1e-9, **writes(1.0))
    rows = [teacher(), small, hf, onnx, export("small", "onnx-int8", 280, 0.0068, **writes(1.9))]
    assert export_sentence(rows, "small") == (
        "Exported as onnx-int8, `small` takes 28% of its bytes, writes 1.1 times as fast and is "
        "0.007 nats of KL away from it."
    )
    # nothing is smaller: the fastest, if it is faster at all
    assert export_sentence(rows[:-1], "small") == (
        "Exported as onnx, `small` writes 2.0 times as fast and predicts the same."
    )
    assert export_sentence(rows[:3], "small") == export_sentence(rows[:2], "small") == ""
    # the best student's export, and that of another student only if it has none
    other = [*rows, row("bare", 5.5, bytes=1000), export("bare", "gguf-q8_0", 300, 0.1)]
    assert "`bare` takes 30%" in export_sentence(other, "bare")
    assert "`small` takes" in export_sentence(other, "gone")
    # its runtime was not installed
    untimed = [*rows[:-1], export("small", "onnx-int8", 280, 0.0068)]
    assert "takes 28% of its bytes and is 0.007 nats" in export_sentence(untimed, "small")


def test_figures_of_different_stores_are_not_compared() -> None:
    elsewhere = row("small", 5.0, heldout="beef")
    apart = result(elsewhere, row("bare", 5.5))
    assert apart.startswith("Teacher and distilled students were measured on different held-out")
    sentence = result(elsewhere)
    assert sentence.startswith("Teacher and students were measured on different held-out stores")
    assert "within 0.10 nats" in result(row("small", 5.0, heldout=None), row("bare", 5.5))
