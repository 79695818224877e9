"""The result of a run in a sentence or two, made of its figures and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .columns import speed_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .columns import Row

_ALIKE = 0.005
"""Nats: losses that differ by less are told as the same."""
_NEAR = 0.25
"""Nats above the teacher that may still be called near it."""
_SAME = 1e-4
"""Nats of KL below which two models are told to say the same."""
_AS_FAST = 0.05
"""Speeds that differ by less of themselves are told as the same; a machine's noise is no less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upbringing:
    """What a student is made of and how it was trained: what a baseline shares with it."""

    listens: bool
    """Whether its objective reads anything of a teacher's."""
    origin: Any
    """What it began as, a JSON value."""
    train: Any
    """How long and how fast, likewise."""


def best_taught(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> Row | None:
    """The row of the student with the lowest loss among those that listened to a teacher."""
    taught = [row for row in _of_students(rows, students) if students[row["name"]].listens]
    return min(taught, key=_loss, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Which rows the result speaks of."""

    best: Row
    """The student with the lowest loss among those that listened."""
    compared: Row
    """The best of those that have a baseline, or again the best if none has."""
    baseline: Row | None


def standing(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> Standing | None:
    """The best student and what it is held against; None if nobody listened."""
    best = best_taught(rows, students)
    if best is None:
        return None
    taught = [row for row in _of_students(rows, students) if students[row["name"]].listens]
    for row in sorted(taught, key=_loss):
        if (baseline := baseline_of(row, rows, students)) is not None:
            return Standing(best=best, compared=row, baseline=baseline)
    return Standing(best=best, compared=best, baseline=None)


def baseline_of(row: Row, rows: Sequence[Row], students: Mapping[str, Upbringing]) -> Row | None:
    """The row of the student that is the same without a teacher: of the same origin, its objective
    reads no teacher. Of several the one that is trained alike, then the best."""
    own = students[row["name"]]
    others = [
        other
        for other in _of_students(rows, students)
        if (found := students[other["name"]]).origin == own.origin and not found.listens
        if own.origin and _compare(other, row)  # of two unknown origins nobody knows
    ]

    def order(other: Row) -> tuple[bool, float]:
        return students[other["name"]].train != own.train, _loss(other)

    return min(others, key=order, default=None)


def verdict(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> str:
    """What was won, and what of it the teacher's record is worth; names stand in backquotes.

    rows      of one run, its teacher's first
    students  those of the run; rows of other names (exports) are no part of the sentence
    """
    teacher = next(row for row in rows if row["role"] == "teacher")
    own = _of_students(rows, students)
    comparable = comparable_students(rows, students)
    if not own:
        return "No student is evaluated yet."
    pair = standing(comparable, students)
    if not comparable or (pair is None and best_taught(own, students) is not None):
        return (
            f"Teacher and {'taught ' if comparable else ''}students were measured on different "
            "held-out stores, so their figures do not compare; coldstill evaluate measures them on "
            "one."
        )
    if pair is None:
        return _untaught(min(comparable, key=_loss), teacher)
    best = pair.best
    taught = sum(students[row["name"]].listens for row in comparable)
    name = f"`{best['name']}`"
    who = name if taught == 1 else f"The best of {taught} taught students, {name},"
    said = _listed([_parameters(best, teacher), *_speed(best, teacher), _quality(best, teacher)])
    if pair.baseline is None:
        return (
            f"{who} {said}. What the teacher is worth to it is not known: no student of the same "
            "kind was trained without one."
        )
    if pair.compared is not best:
        return f"{who} {said}. {_worth_elsewhere(pair.compared, pair.baseline)}"
    same = students[pair.baseline["name"]].train == students[best["name"]].train
    return f"{who} {said}{_worth(best, pair.baseline, teacher, alike=same)}"


def export_sentence(rows: Sequence[Row], best: str) -> str:
    """What the smallest export of a student wins, or its fastest if none is smaller; of the student
    named, or of the best that has exports. Nothing if there is nothing to win."""
    exports = [row for row in rows if row["role"] == "export"]
    if not exports:
        return ""
    owners = [row["of"] for row in exports]
    of = best if best in owners else owners[0]
    student = next(row for row in rows if row["name"] == of)
    own = [row for row in exports if row["of"] == of]
    chosen = min(own, key=lambda row: float(row["bytes"]))
    if not _takes(chosen, student):
        chosen = max(own, key=lambda row: _factor(row, student))
        if _factor(chosen, student) <= 1 + _AS_FAST:
            return ""
    won = [*_takes(chosen, student), *_speed(chosen, student)]
    kl = chosen["kl_from_student"]
    far = f"is {kl:.1g} nats of KL away from it" if kl >= _SAME else "says the same"
    return f"Exported as {chosen['format']}, `{of}` {_listed([*won, far])}."


def _takes(export: Row, student: Row) -> list[str]:
    """How much smaller an export is, where it is."""
    share = export["bytes"] / max(1, student["bytes"])
    return [f"takes {_percent(share)} of its bytes"] if 0 < share < 1 - _AS_FAST else []


def comparable_students(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> list[Row]:
    """The rows of students that were measured on the teacher's held-out store."""
    teacher = next(row for row in rows if row["role"] == "teacher")
    return [row for row in _of_students(rows, students) if _compare(row, teacher)]


def _of_students(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> list[Row]:
    return [row for row in rows if row["role"] != "teacher" and row["name"] in students]


def _loss(row: Row) -> float:
    return float(row["loss"])


def _compare(row: Row, other: Row) -> bool:
    """Whether both were measured on one held-out store, or nobody knows otherwise."""
    stores = {found for one in (row, other) if (found := one.get("heldout")) is not None}
    return len(stores) < 2


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _parameters(row: Row, teacher: Row) -> str:
    share = row["parameters"] / max(1, teacher["parameters"])
    if 0.995 <= share < 1.005:
        return "has as many parameters as the teacher"
    if share > 1:
        return f"has {_times(share)} times the teacher's parameters"
    return f"has {_percent(share)} of the teacher's parameters"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}"


def _speed(row: Row, other: Row) -> list[str]:
    """How fast it writes one text, against another model; nothing where that was not measured."""
    factor = _factor(row, other)
    if not factor:
        return []
    if abs(factor - 1) <= _AS_FAST:
        return ["writes about as fast"]
    if factor < 1:
        return [f"writes at {_percent(factor)} of its speed"]
    return [f"writes {_times(factor)} times as fast"]


def _factor(row: Row, other: Row) -> float:
    """How many times as fast it writes on the same machine; 0 where that was not measured."""
    if not row.get("machine") or row["machine"] != other.get("machine"):
        return 0.0
    own, theirs = (speed_of(one).get("token_seconds") for one in (row, other))
    return float(theirs / own) if own and theirs else 0.0


def _quality(row: Row, teacher: Row) -> str:
    above = row["loss"] - teacher["loss"]
    if abs(above) < _ALIKE:
        return f"matches its held-out loss of {teacher['loss']:.2f} nats"
    if above < 0:
        return f"ends {_nats(-above)} below it in held-out loss"
    if above <= _NEAR:
        # upwards: "within" must hold
        return f"keeps held-out loss within {math.ceil(100 * above - 1e-9) / 100:.2f} nats of it"
    return f"ends {_nats(above)} above it in held-out loss"


def _worth(row: Row, baseline: Row, teacher: Row, *, alike: bool) -> str:
    """The end of the sentence: what became of the same model without the teacher."""
    gain, away = baseline["loss"] - row["loss"], baseline["loss"] - teacher["loss"]
    model = "the same model" if alike else "the same model, though trained with other settings,"
    if abs(gain) < _ALIKE:
        return f"; without the teacher {model} ends as well, so here the teacher did not help."
    if gain < 0:
        end = f"ends {_nats(-gain)} lower, so here the teacher did not help."
        return f"; but without the teacher {model} {end}"
    if away >= _ALIKE and row["loss"] - teacher["loss"] > -_ALIKE:
        return f"; without the teacher {model} ends {_nats(away)} away."
    # where the teacher itself is no mark to be reached, the distance to it says little
    return f"; without the teacher {model} ends {_nats(gain)} higher."


def _worth_elsewhere(row: Row, baseline: Row) -> str:
    """The same where the best student has no baseline, but another has."""
    gain, name = baseline["loss"] - row["loss"], f"`{row['name']}`"
    if gain >= _ALIKE:
        return (
            f"What the teacher is worth shows in {name}: without it the same model ends "
            f"{_nats(gain)} higher."
        )
    end = "ends as well" if gain > -_ALIKE else f"ends {_nats(-gain)} lower"
    return f"Without the teacher the same model as {name} {end}, so there it did not help."


def _untaught(best: Row, teacher: Row) -> str:
    """Where no student listened to anybody."""
    return (
        "No student that learned from the teacher is evaluated; the best of those without one, "
        f"`{best['name']}`, {_listed([_parameters(best, teacher), _quality(best, teacher)])}."
    )


def _nats(value: float) -> str:
    return f"{value:z.2f} nats"
