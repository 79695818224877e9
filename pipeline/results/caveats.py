"""What must be known before figures are compared: warnings, and notes that stand below them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .columns import COST, QUALITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .columns import Row


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these figures: a line each."""
    found = _stale(rows)
    stores, machines = heldout_groups(rows), machine_groups(rows)
    if len(stores) > 1:
        told = " against ".join(_in_few_words(names, rows) for names in stores.values())
        found.append(
            f"measured on {len(stores)} different held-out stores, so their figures do not "
            f"compare: {told}"
        )
    if len(machines) > 1:
        told = " against ".join(
            f"{_in_few_words(names, rows)} ({machine})" for machine, names in machines.items()
        )
        found.append(
            f"measured on {len(machines)} different machines, so speed and memory do not compare: "
            f"{told}"
        )
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What stands below the tables: how figures came about, and what differs besides the models."""
    found = []
    samples = sorted({row["sample_positions"] for row in rows if row.get("sample_positions")})
    if samples:
        told = " or ".join(f"{count:,}" for count in samples)
        found.append(
            "An export's quality is its student's, plus the difference between both on "
            f"{told} held-out positions."
        )
    runtimes = _by_runtime(rows)
    if len(runtimes) > 1:
        told = ", ".join(f"{name} ({', '.join(models)})" for name, models in runtimes.items())
        found.append(f"Run by {told}.")
    whole = {row["dtype"] for row in rows if row.get("dtype") and row.get("role") != "export"}
    if len(whole) > 1:
        found.append(
            f"Weights are {' and '.join(sorted(whole))}: precision moves speed and memory as size "
            "does."
        )
    return found


def missing(rows: Sequence[Row]) -> list[str]:
    """Why a figure is not known, a line for each reason: the columns, and the models."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in (*QUALITY, *COST):
        names = tuple(row["name"] for row in rows if column.value(row) is None)
        if names:
            titles = found.setdefault((column.missing, names), [])
            title = f"{column.title} ({column.group})" if column.group else column.title
            if title not in titles:
                titles.append(title)
    return [
        f"No {', '.join(titles)} of {_in_few_words(list(names), rows)}: {reason}."
        for (reason, names), titles in found.items()
    ]


def _by_runtime(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Which models ran in which library; formats of exports once, however many students have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("runtime") and row.get("generation"):
            is_export = row.get("role") == "export"
            name = row["format"] if is_export else "models"
            models = found.setdefault(row["runtime"], [])
            if name not in models:
                models.append(name)
    return found


def _stale(rows: Sequence[Row]) -> list[str]:
    """Of figures older than the weights, and of exports that are of others than the figures."""
    found = [
        f"{row['name']}: its figures are older than its weights; run coldstill evaluate"
        for row in rows
        if row.get("older_than_weights")
    ]
    return found + [
        f"{row['name']}: its export {name} is of other weights than its figures, so it is left "
        "out; run coldstill evaluate, and where that changes nothing delete the export and run "
        "coldstill export"
        for row in rows
        for name in row.get("stale_exports", ())
    ]


def heldout_groups(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Held-out stores, and the names of the models that were measured on each."""
    return _grouped((row for row in rows if row.get("role") != "export"), "heldout")


def machine_groups(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Machines, and the names of the models that were timed on each."""
    return _grouped((row for row in rows if row.get("generation")), "machine")


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.get(key) not in (None, ""):
            groups.setdefault(row[key], []).append(row["name"])
    return groups


def lacking(rows: Sequence[Row]) -> list[str]:
    """Models whose figures are of an older version, without what plots need."""
    return [row["name"] for row in rows if "calibration" not in row]


def _in_few_words(names: Sequence[str], rows: Sequence[Row]) -> str:
    """These models, or their runs if no other model is of those."""
    inside = [row for row in rows if row["name"] in names]
    runs = {row.get("run") for row in inside}
    outside = [row for row in rows if row not in inside and row.get("role") != "export"]
    if None not in runs and not any(row.get("run") in runs for row in outside):
        names = sorted(str(run) for run in runs)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
