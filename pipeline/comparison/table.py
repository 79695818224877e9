"""The table of models: its columns, its cells, and what its reader must know beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..units import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]

CACHED_BYTES = "cached_bytes_per_position"
"""Of the stores that a student was trained from: a key of its figures beside the measured ones."""
TOKEN_SECONDS = "token_seconds"
"""Of writing one token at batch 1, out of a row's `generation`."""
COLUMNS = (
    ("name", "model"),
    ("parameters", "parameters"),
    ("bytes", "size"),
    (CACHED_BYTES, "cached"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("bits_per_byte", "bits/byte"),
    ("kl", "KL"),
    ("agreement", "agreement"),
    ("acceptance", "acceptance"),
    ("ece", "ECE"),
    ("tokens_per_second", "tokens/s"),
    (TOKEN_SECONDS, "ms/token"),
    ("peak_memory_bytes", "memory"),
)
"""Keys of a row and their titles, in the order of the table."""


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these figures: a line each."""
    found = _stale(rows)
    groups = heldout_groups(rows)
    if len(groups) > 1:
        told = " against ".join(_in_few_words(group, rows) for group in groups)
        found.append(
            f"measured on {len(groups)} different held-out stores, so their figures do not "
            f"compare: {told}"
        )
    return found


def _stale(rows: Sequence[Row]) -> list[str]:
    """Of exports that have no row."""
    return [
        f"{row['name']}: its export {name} is of other weights, so it is left out; delete it and "
        "run coldstill export"
        for row in rows
        for name in row.get("stale_exports", ())
    ]


def heldout_groups(rows: Iterable[Row]) -> list[list[str]]:
    """Names of the models that were measured on one held-out store, for each such store."""
    groups: dict[Any, list[str]] = {}
    for row in rows:
        if row.get("heldout") is not None:
            groups.setdefault(row["heldout"], []).append(row["name"])
    return list(groups.values())


def lacking(rows: Sequence[Row]) -> list[str]:
    """Models whose figures are of an older version, without what plots need."""
    return [row["name"] for row in rows if "calibration" not in row]


def table(rows: Sequence[Row]) -> str:
    """For a terminal: aligned, numbers to the right."""
    lines = [[title for _, title in COLUMNS], *[cells(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in [lines[0], rule, *lines[1:]])
    )


def markdown(rows: Sequence[Row]) -> str:
    """The same for a page."""
    head = "| " + " | ".join(title for _, title in COLUMNS) + " |\n"
    rule = "|---" + "|---:" * (len(COLUMNS) - 1) + "|\n"
    shown = (" | ".join(cell.replace("|", "\\|") for cell in cells(row)) for row in rows)
    return head + rule + "".join(f"| {line} |\n" for line in shown)


def cells(row: Row) -> list[str]:
    """The texts of a row, in the order of `COLUMNS`."""
    return [_cell(key, row.get(key)) for key, _ in COLUMNS]


def _cell(key: str, value: Any) -> str:
    if key == "name":
        return str(value)
    if key in ("bytes", "peak_memory_bytes"):
        return size(value) if value else "-"  # too little to be measured
    if value is None:
        return "-"
    if key == CACHED_BYTES:
        return f"{value:.1f} B" if value else "0 B"
    if key in ("parameters", "tokens_per_second"):
        return f"{value:,.0f}"
    if key in ("agreement", "acceptance", "ece"):
        return f"{value:.1%}"
    if key == TOKEN_SECONDS:
        return f"{value * 1e3:.2f}"
    return f"{value:.2f}" if key == "perplexity" else f"{value:.4f}"


def _in_few_words(names: Sequence[str], rows: Sequence[Row]) -> str:
    """These models, or their runs if no other model is of those."""
    inside = [row for row in rows if row["name"] in names]
    runs = {row.get("run") for row in inside}
    if None not in runs and not any(row.get("run") in runs for row in rows if row not in inside):
        names = sorted(str(run) for run in runs)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
