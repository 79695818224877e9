"""The result of a run in one or two sentences, derived from its figures alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .figures import students_of, teachers_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .figures import ModelFigures

_ALIKE = 0.005
"""Nats: losses that differ by less are called the same."""
_NEAR = 0.25
"""Nats above the teacher that may still be called near it."""
_SAME = 1e-4
"""Nats of KL below which two models are called the same."""
_AS_FAST = 0.05
"""Relative difference below which speeds are called the same: a machine's noise is about that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a student was made; a baseline shares everything but the teacher with it."""

    uses_teacher: bool
    """Whether its objective reads targets of a teacher."""
    origin: Any
    """Its initial weights, a JSON value."""
    settings: Any
    """Length, learning rate and the like, a JSON value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The rows that the result is about."""

    best: ModelFigures
    """The student with the lowest loss among those that used a teacher."""
    compared: ModelFigures
    """The best of those that have a baseline, or `best` if none has."""
    baseline: ModelFigures | None


def contest(rows: Sequence[ModelFigures], trainings: Mapping[str, Training]) -> Contest | None:
    """The best student and its baseline; None if no student used a teacher."""
    distilled = sorted(_with_teacher(rows, trainings), key=_loss)
    for row in distilled:
        if (baseline := baseline_of(row, rows, trainings)) is not None:
            return Contest(best=distilled[0], compared=row, baseline=baseline)
    return Contest(best=distilled[0], compared=distilled[0], baseline=None) if distilled else None


def baseline_of(
    row: ModelFigures, rows: Sequence[ModelFigures], trainings: Mapping[str, Training]
) -> ModelFigures | None:
    """The student of the same origin that was trained without a teacher.

    Among several, one with the same training settings is preferred, then the lowest loss.
    """
    own = trainings[row.name]
    others = [
        other
        for other in _known(rows, trainings)
        if (found := trainings[other.name]).origin == own.origin and not found.uses_teacher
        if own.origin and _compare(other, row)  # two unknown origins need not be the same
    ]

    def order(other: ModelFigures) -> tuple[bool, float]:
        return trainings[other.name].settings != own.settings, other.own_loss

    return min(others, key=order, default=None)


def verdict(rows: Sequence[ModelFigures], trainings: Mapping[str, Training]) -> str:
    """What distillation achieved, and how much of it the teacher explains.

    Names stand in backquotes.

    rows       rows of one run, the teacher's row first
    trainings  trainings of the students to compare
    """
    teacher = teachers_of(rows)[0]
    own = _known(rows, trainings)
    comparable = comparable_students(rows, trainings)
    if not own:
        return "No student is evaluated yet."
    pair = contest(comparable, trainings)
    if not comparable or (pair is None and _with_teacher(own, trainings)):
        return (
            f"Teacher and {'distilled ' if comparable else ''}students were measured on different "
            "held-out stores, so their figures do not compare; coldstill evaluate measures them on "
            "one."
        )
    if pair is None:
        return _without_teacher(min(comparable, key=_loss), teacher)
    best = pair.best
    distilled = len(_with_teacher(comparable, trainings))
    name = f"`{best.name}`"
    who = name if distilled == 1 else f"The best of {distilled} distilled students, {name},"
    parts = _listed([_parameters(best, teacher), *_speed(best, teacher), _quality(best, teacher)])
    if pair.baseline is None:
        return (
            f"{who} {parts}. The teacher's effect on it is not known: no student of the same kind "
            "was trained without one."
        )
    if pair.compared is not best:
        return f"{who} {parts}. {_other_compared(pair.compared, pair.baseline)}"
    same = trainings[pair.baseline.name].settings == trainings[best.name].settings
    return f"{who} {parts}{_compared(best, pair.baseline, teacher, alike=same)}"


def ahead_sentence(rows: Sequence[ModelFigures], trainings: Mapping[str, Training]) -> str:
    """Names the distilled students that end above the same model without a teacher, other than the
    student that the verdict compares; empty if there are none.

    rows  rows of one run, the teacher's row first
    """
    comparable = comparable_students(rows, trainings)
    pair = contest(comparable, trainings)
    told = None if pair is None or pair.baseline is None else pair.compared.name
    found = [
        f"`{baseline.name}`{_settings(row, baseline, trainings)} ends "
        f"{_nats(row.own_loss - baseline.own_loss)} below `{row.name}`"
        for row in _with_teacher(comparable, trainings)
        if row.name != told and (baseline := baseline_of(row, comparable, trainings)) is not None
        if row.own_loss - baseline.own_loss >= _ALIKE
    ]
    return f"Without a teacher, {_listed(found)} in held-out loss." if found else ""


def _settings(row: ModelFigures, baseline: ModelFigures, trainings: Mapping[str, Training]) -> str:
    alike = trainings[row.name].settings == trainings[baseline.name].settings
    return "" if alike else ", though trained with other settings,"


def export_sentence(rows: Sequence[ModelFigures], best: str) -> str:
    """The gain of a student's smallest export, or of the fastest one if none is smaller.

    It is about the student named, or the best one that has exports; empty if nothing is gained.
    """
    exports = [row for row in rows if row.is_export]
    if not exports:
        return ""
    owners = [row.of for row in exports]
    of = best if best in owners else owners[0]
    student = next(row for row in rows if row.name == of)
    own = [row for row in exports if row.of == of]
    chosen = min(own, key=lambda row: row.bytes)
    if not _takes(chosen, student):
        chosen = max(own, key=lambda row: _factor(row, student))
        if _factor(chosen, student) <= 1 + _AS_FAST:
            return ""
    gains = [*_takes(chosen, student), *_speed(chosen, student)]
    kl = chosen.kl_from_student or 0.0
    far = f"is {kl:.1g} nats of KL away from it" if kl >= _SAME else "predicts the same"
    return f"Exported as {chosen.format}, `{of}` {_listed([*gains, far])}."


def comparable_students(
    rows: Sequence[ModelFigures], trainings: Mapping[str, Training]
) -> list[ModelFigures]:
    """The rows of students that were measured on the teacher's held-out store."""
    teacher = teachers_of(rows)[0]
    return [row for row in _known(rows, trainings) if _compare(row, teacher)]


def _known(rows: Sequence[ModelFigures], trainings: Mapping[str, Training]) -> list[ModelFigures]:
    return [row for row in students_of(rows) if row.name in trainings]


def _with_teacher(
    rows: Sequence[ModelFigures], trainings: Mapping[str, Training]
) -> list[ModelFigures]:
    return [row for row in _known(rows, trainings) if trainings[row.name].uses_teacher]


def _takes(export: ModelFigures, student: ModelFigures) -> list[str]:
    """How much smaller an export is than its student; nothing if it is not smaller."""
    share = export.bytes / max(1, student.bytes)
    return [f"takes {_percent(share)} of its bytes"] if 0 < share < 1 - _AS_FAST else []


def _loss(row: ModelFigures) -> float:
    return row.own_loss


def _compare(row: ModelFigures, other: ModelFigures) -> bool:
    """Whether both were measured on one held-out store, as far as that is known."""
    return len({row.heldout, other.heldout} - {None}) < 2


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _parameters(row: ModelFigures, teacher: ModelFigures) -> str:
    share = row.parameters / max(1, teacher.parameters)
    if 0.995 <= share < 1.005:
        return "has as many parameters as the teacher"
    if share > 1:
        return f"has {_times(share)} times the teacher's parameters"
    return f"has {_percent(share)} of the teacher's parameters"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}"


def _speed(row: ModelFigures, other: ModelFigures) -> list[str]:
    """How fast a model generates one text, against another; nothing where it was not measured."""
    factor = _factor(row, other)
    if not factor:
        return []
    if abs(factor - 1) <= _AS_FAST:
        return ["writes about as fast"]
    if factor < 1:
        return [f"writes at {_percent(factor)} of its speed"]
    return [f"writes {_times(factor)} times as fast"]


def _factor(row: ModelFigures, other: ModelFigures) -> float:
    """How many times as fast a model generates on the same machine; 0 where not measured."""
    own, theirs = row.speed(), other.speed()
    if not row.machine or row.machine != other.machine or own is None or theirs is None:
        return 0.0
    return theirs.token_seconds / own.token_seconds if own.token_seconds else 0.0


def _quality(row: ModelFigures, teacher: ModelFigures) -> str:
    if teacher.loss is None:
        return f"has a held-out loss of {row.own_loss:.2f} nats, the teacher's own is not known"
    above = row.own_loss - teacher.loss
    if abs(above) < _ALIKE:
        return f"matches its held-out loss of {teacher.loss:.2f} nats"
    if above < 0:
        return f"ends {_nats(-above)} below it in held-out loss"
    if above <= _NEAR:
        # rounded up, so that "within" holds
        return f"keeps held-out loss within {math.ceil(100 * above - 1e-9) / 100:.2f} nats of it"
    return f"ends {_nats(above)} above it in held-out loss"


def _compared(
    row: ModelFigures, baseline: ModelFigures, teacher: ModelFigures, *, alike: bool
) -> str:
    """The end of the sentence: the loss of the same model without the teacher."""
    gain = baseline.own_loss - row.own_loss
    model = "the same model" if alike else "the same model, though trained with other settings,"
    if abs(gain) < _ALIKE:
        end = "reaches the same loss, so here the teacher did not help."
        return f"; without the teacher {model} {end}"
    if gain < 0:
        end = f"ends {_nats(-gain)} lower, so here the teacher did not help."
        return f"; but without the teacher {model} {end}"
    if teacher.loss is not None and row.own_loss - teacher.loss > -_ALIKE:
        away = baseline.own_loss - teacher.loss
        if away >= _ALIKE:
            return f"; without the teacher {model} ends {_nats(away)} away."
    # the student is past the teacher, or nothing is known of the teacher's loss
    return f"; without the teacher {model} ends {_nats(gain)} higher."


def _other_compared(row: ModelFigures, baseline: ModelFigures) -> str:
    """A sentence on another student than the best one, which has no baseline."""
    gain, name = baseline.own_loss - row.own_loss, f"`{row.name}`"
    if gain >= _ALIKE:
        return (
            f"The teacher's effect is known for {name}: without the teacher the same model ends "
            f"{_nats(gain)} higher."
        )
    end = "reaches the same loss" if gain > -_ALIKE else f"ends {_nats(-gain)} lower"
    return f"Without the teacher the same model as {name} {end}, so there it did not help."


def _without_teacher(best: ModelFigures, teacher: ModelFigures) -> str:
    """The result of a run in which no student used a teacher."""
    return (
        "No student that learned from the teacher is evaluated; the best of those without one, "
        f"`{best.name}`, {_listed([_parameters(best, teacher), _quality(best, teacher)])}."
    )


def _nats(value: float) -> str:
    return f"{value:z.2f} nats"
