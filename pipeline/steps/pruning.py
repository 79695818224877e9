"""The step before stage two: cut students out of the teacher, and show what is left of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from .students import alone, job_as_trained, open_made, teacher_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .work import Work

Cuts = list[dict[str, Any]]
"""What is told of each cut of a student, the first one first."""


def prune_students(work: Work, names: Sequence[str]) -> dict[str, Cuts]:
    """Make the due cut of the named students, or of all that the recipe prunes.

    Raises
        ColdstillError: a student that is not pruned, sizes that cannot be, another teacher than the
            store's, no store
    """
    from ...stages.prune_student import prune_student

    pruned = [name for name, student in work.recipe.students.items() if student.prune]
    for name in names:
        if not work.recipe.student(name).prune:
            raise ColdstillError(
                f"students.{name}: has no 'prune', such as prune = {{ parameters = \"50%\" }}, so "
                f"there is nothing to cut (students with one: {', '.join(pruned) or 'none'})"
            )
    if not (chosen := list(names) or pruned):
        raise ColdstillError(
            f"{work.recipe.name}: no student of the recipe has 'prune', such as "
            'prune = { parameters = "50%" }'
        )
    store = open_made(work.run.logits, work)
    jobs = {name: job_as_trained(work, name, store) for name in chosen}
    cuts: dict[str, Cuts] = {}
    for name, job in jobs.items():
        folder = work.run.student(name)
        with alone(folder):
            job = dataclasses.replace(
                job,
                teacher=teacher_weights(work, work.recipe.student(name), folder),
                begin=functools.partial(work.begin, student=True),
            )
            cuts[name] = prune_student(job, store, work.report)
    return cuts


def text(cuts: dict[str, Cuts]) -> str:
    """For a terminal: a table for each cut."""
    return "\n\n".join(
        _table(name if len(records) == 1 else f"{name}, cut {number} of {len(records)}", record)
        for name, records in cuts.items()
        for number, record in enumerate(records, 1)
    )


def _table(title: str, record: dict[str, Any]) -> str:
    before, after = record["sizes"]["before"], record["sizes"]["after"]
    rows = [
        (
            key.replace("kv_", "key-value ").replace("_", " "),
            f"{before[key]:,}",
            f"{after[key]:,}",
            "" if before[key] == after[key] else f"{after[key] / before[key]:.1%}",
        )
        for key in ("layers", "hidden", "feed_forward", "heads", "kv_heads")
    ]
    count, loss = record["parameters"], record["loss"]
    share = f"{count['after'] / count['before']:.1%}"
    if count["before"] != count["teacher"]:
        share += f", {count['after'] / count['teacher']:.1%} of the teacher"
    rows.append(("parameters", f"{count['before']:,}", f"{count['after']:,}", share))
    measured = f"on {loss['sequences']:,} sequences of the store, before any training"
    rows.append(("loss", f"{loss['before']:.4f}", f"{loss['after']:.4f}", measured))
    layers = record["kept"]["layers"]
    if len(layers) < before["layers"]:
        rows.append(("layers kept", "", "", ", ".join(map(str, layers))))
    rows.insert(0, (title, "before", "after", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}  {note}".rstrip()
        for a, b, c, note in rows
    )
