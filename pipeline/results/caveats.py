"""What a reader must know before comparing figures: warnings, and notes below the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .columns import COST, QUALITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .figures import ModelFigures


def warnings(rows: Sequence[ModelFigures]) -> list[str]:
    """Reasons why figures do not compare or are out of date, one line each."""
    found = _stale(rows)
    stores, machines = heldout_groups(rows), machine_groups(rows)
    if len(stores) > 1:
        models = " against ".join(_shortly(names, rows) for names in stores.values())
        found.append(
            f"measured on {len(stores)} different held-out stores, so their figures do not "
            f"compare: {models}"
        )
    if len(machines) > 1:
        models = " against ".join(
            f"{_shortly(names, rows)} ({machine})" for machine, names in machines.items()
        )
        found.append(
            f"measured on {len(machines)} different machines, so speed and memory do not compare: "
            f"{models}"
        )
    return found


def notes(rows: Sequence[ModelFigures]) -> list[str]:
    """How the figures were made, and what differs besides the models."""
    found = []
    samples = sorted({row.sample_positions for row in rows if row.sample_positions})
    if samples:
        counts = " or ".join(f"{count:,}" for count in samples)
        found.append(
            "An export's quality is its student's, plus the difference between both on "
            f"{counts} held-out positions."
        )
    runtimes = _by_runtime(rows)
    if len(runtimes) > 1:
        models = ", ".join(f"{name} ({', '.join(models)})" for name, models in runtimes.items())
        found.append(f"Run by {models}.")
    precisions = {row.dtype for row in rows if row.dtype and not row.is_export}
    if len(precisions) > 1:
        found.append(
            f"Weights are {' and '.join(sorted(precisions))}: precision changes speed and memory "
            "as size does."
        )
    return found


def missing(rows: Sequence[ModelFigures]) -> list[str]:
    """A line for each reason why figures are not known, with the columns and the models."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in (*QUALITY, *COST):
        names = tuple(row.name for row in rows if column.value(row) is None)
        if names:
            titles = found.setdefault((column.missing, names), [])
            title = f"{column.title} ({column.group})" if column.group else column.title
            if title not in titles:
                titles.append(title)
    return [
        f"{', '.join(titles)}: not known for {_shortly(list(names), rows)}: {reason}."
        for (reason, names), titles in found.items()
    ]


def without_calibration(rows: Sequence[ModelFigures]) -> list[str]:
    """Models whose figures were written by a version that did not measure calibration."""
    return [row.name for row in rows if not row.has("calibration")]


def heldout_groups(rows: Iterable[ModelFigures]) -> dict[str, list[str]]:
    """Held-out stores, and the names of the models that were measured on each."""
    return _grouped((row.heldout, row.name) for row in rows if not row.is_export)


def machine_groups(rows: Iterable[ModelFigures]) -> dict[str, list[str]]:
    """Machines, and the names of the models that were timed on each."""
    return _grouped((row.machine, row.name) for row in rows if row.generation)


def _grouped(pairs: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        if key:
            groups.setdefault(key, []).append(name)
    return groups


def _by_runtime(rows: Sequence[ModelFigures]) -> dict[str, list[str]]:
    """Models that ran in each library; a format of exports once, for all students."""
    groups = _grouped(
        (row.runtime, row.short_name if row.is_export else "models")
        for row in rows
        if row.generation
    )
    return {runtime: list(dict.fromkeys(names)) for runtime, names in groups.items()}


def _stale(rows: Sequence[ModelFigures]) -> list[str]:
    """Figures older than their weights, and exports of other weights than the figures."""
    found = [
        f"{row.name}: its figures are older than its weights; run coldstill evaluate"
        for row in rows
        if row.older_than_weights
    ]
    return found + [
        f"{row.name}: its export {name} was made from other weights than its figures, so it is "
        "left out; run coldstill evaluate, and if that changes nothing delete the export and run "
        "coldstill export"
        for row in rows
        for name in row.stale_exports
    ]


def _shortly(names: Sequence[str], rows: Sequence[ModelFigures]) -> str:
    """The names of models, or of their runs if these models are all that the runs have."""
    inside = [row for row in rows if row.name in names]
    runs = {row.run for row in inside}
    outside = {row.run for row in rows if row.name not in names and not row.is_export}
    if None not in runs and not runs & outside:
        names = sorted(str(run) for run in runs)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
