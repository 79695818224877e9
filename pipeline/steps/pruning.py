"""The step before stage two: cut students out of the teacher, and show what remains of it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ...data.errors import ColdstillError
from .students import claimed_student, job_as_trained, open_made, teacher_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..recipe.work import Work

_SIZES = {
    "layers": "layers",
    "hidden": "hidden",
    "feed_forward": "feed forward",
    "heads": "heads",
    "kv_heads": "key-value heads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One cut of a student: `before` is the model that was cut, `after` the smaller one."""

    teacher_parameters: int
    parameters: tuple[int, int]
    """Number of parameters before and after."""
    sizes: dict[str, tuple[int, int]]
    """Each size before and after: layers, hidden, feed_forward, heads, kv_heads."""
    loss: tuple[float, float]
    """Mean loss in nats before and after, without any training."""
    sequences: int
    """Number of sequences on which the loss was measured."""
    kept_layers: tuple[int, ...]
    """Layers that were kept, counted from 0."""
    record: dict[str, Any]
    """The content of pruning.json, which also lists the kept heads and the scores of layers."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cut:
        sizes, parameters, loss = record["sizes"], record["parameters"], record["loss"]
        return cls(
            teacher_parameters=parameters["teacher"],
            parameters=(parameters["before"], parameters["after"]),
            sizes={name: (sizes["before"][name], sizes["after"][name]) for name in _SIZES},
            loss=(loss["before"], loss["after"]),
            sequences=loss["sequences"],
            kept_layers=tuple(record["kept"]["layers"]),
            record=record,
        )


def prune_students(work: Work, names: Sequence[str]) -> dict[str, tuple[Cut, ...]]:
    """Make the next cut of the named students, or of all that the recipe prunes.

    Returns all cuts of each student so far, the first cut first.

    Raises
        ColdstillError: a student without `prune`, sizes that do not fit the teacher, another
            teacher than the store's, or no store
    """
    from ...stages.train_student import prune_student

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
    cuts = {}
    for name, job in jobs.items():
        folder = work.run.student(name)
        with claimed_student(folder):
            job = dataclasses.replace(
                job,
                teacher=teacher_weights(work, work.recipe.student(name), folder),
                begin=functools.partial(work.begin, student=True),
            )
            cuts[name] = tuple(map(Cut.of, prune_student(job, store, work.report)))
    return cuts


def cuts_text(cuts: Mapping[str, Sequence[Cut]]) -> str:
    return "\n\n".join(
        _table(name if len(each) == 1 else f"{name}, cut {number} of {len(each)}", cut)
        for name, each in cuts.items()
        for number, cut in enumerate(each, 1)
    )


def _table(title: str, cut: Cut) -> str:
    rows: list[tuple[str, ...]] = [
        (_SIZES[name], f"{old:,}", f"{new:,}", "" if old == new else f"{new / old:.1%}")
        for name, (old, new) in cut.sizes.items()
    ]
    before, after = cut.parameters
    share = f"{after / before:.1%}"
    if before != cut.teacher_parameters:
        share += f", {after / cut.teacher_parameters:.1%} of the teacher"
    rows.append(("parameters", f"{before:,}", f"{after:,}", share))
    measured = f"on {cut.sequences:,} sequences of the store, before any training"
    rows.append(("loss", *(f"{loss:.4f}" for loss in cut.loss), measured))
    if len(cut.kept_layers) < cut.sizes["layers"][0]:
        rows.append(("layers kept", "", "", ", ".join(map(str, cut.kept_layers))))
    table = tabulate(
        rows,
        headers=(title, "before", "after", ""),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "right", "right", "left"),
    )
    return "\n".join(line.rstrip() for line in table.splitlines())
