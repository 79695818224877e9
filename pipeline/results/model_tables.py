"""The two tables of models: their columns, the warnings and notes around them, and their text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from ..units import display_width, short, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .figures import ModelFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of all models."""

    key: str
    title: str
    value: Callable[[ModelFigures], Any]
    """The figure of a model; None where it is not known."""
    text: Callable[[Any], str]
    """The figure as it is shown."""
    group: str = ""
    """Title above those of neighbouring columns."""
    better: Literal["less", "more", ""] = ""
    depends_on: Literal["model", "text", "machine"] = "model"
    """Figures compare only where this is the same."""
    missing: str = ""
    """Reason why a figure can be unknown, for the note below a table."""

    def cell(self, row: ModelFigures) -> str:
        """The figure as text; `-` where it is not known."""
        value = self.value(row)
        return "-" if value is None else self.text(value)


def _measured(key: str) -> Callable[[ModelFigures], Any]:
    """A figure whose 0 means that it was too small to be measured."""
    return lambda row: getattr(row, key) or None


def _precision(row: ModelFigures) -> str | None:
    """Precision on disk, and the few bits that it holds, such as "fp32 (int4 values)"."""
    return f"{row.dtype} ({row.grid} values)" if row.grid else row.dtype or None


def _speed(key: str, batch: int = 1) -> Callable[[ModelFigures], Any]:
    return lambda row: getattr(row.speed(batch), key, None) or None


_whole, _nats, _share = "{:,.0f}".format, "{:z.4f}".format, "{:z.1%}".format


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _cached(value: float) -> str:
    return f"{value:.1f} B" if value else "0 B"


def _figure(
    key: str,
    title: str,
    text: Callable[[Any], str],
    better: Literal["less", "more"] = "less",
    depends_on: Literal["model", "text"] = "text",
    missing: str = "",
) -> Column:
    return Column(
        key=key,
        title=title,
        value=attrgetter(key),
        text=text,
        better=better,
        depends_on=depends_on,
        missing=missing,
    )


_LACKS = "the held-out store lacks the mass outside the teacher's head"
CACHED = _figure(
    "cached_bytes_per_position", "stored", _cached, depends_on="model",
    missing="only students that were trained from a store have this figure",
)  # fmt: skip
QUALITY = (
    _figure("parameters", "parameters", _whole, depends_on="model"),
    CACHED,
    _figure("loss", "loss", _nats, missing=_LACKS),
    _figure("perplexity", "perplexity", "{:.2f}".format, missing=_LACKS),
    _figure("bits_per_byte", "bits/byte", _nats,
            missing="the bytes of the held-out text, or the loss, are not known"),
    _figure("kl", "KL", _nats),
    _figure("agreement", "agreement", _share, "more"),
    _figure("acceptance", "acceptance", _share, "more", missing=_LACKS),
    _figure("ece", "ECE", _share, missing=_LACKS),
)  # fmt: skip
"""How good a model is; each table begins with a column of names."""


def _own(
    key: str, title: str, text: Callable[[Any], str], better: Literal["less", "more"]
) -> Column:
    return Column(
        key=f"own_{key}",
        title=title,
        value=lambda row: row.on_own_text(key),
        text=text,
        group="own text",
        better=better,
        depends_on="text",
        missing="only students with rounds write text that the teacher scores",
    )


_OWN_TEXT = (_own("kl", "KL", _nats, "less"), _own("acceptance", "acceptance", _share, "more"))


def quality_columns(rows: Iterable[ModelFigures]) -> tuple[Column, ...]:
    """The columns of quality; those on a student's own text only where a model has them."""
    return (*QUALITY, *_OWN_TEXT) if any(row.own_text for row in rows) else QUALITY


_OLD = "it was evaluated by an older version; delete evaluation.json and evaluate again"
_UNTIMED = (
    "it was not timed at that batch size: it has no key-value cache, its texts are too short, or "
    "its runtime is not installed"
)


def _timed(key: str, title: str, better: Literal["less", "more"], batch: int = 1) -> Column:
    return Column(
        key=f"{key}_{batch}",
        title=title,
        value=_speed(key, batch),
        text=_milliseconds if key.endswith(("seconds", "p95")) else _whole,
        group=f"batch {batch}",
        better=better,
        depends_on="machine",
        missing=_UNTIMED,
    )


COST = (
    Column(key="dtype", title="precision", value=_precision, text=str, missing=_OLD),
    Column(key="bytes", title="size", value=_measured("bytes"), text=size, better="less",
           missing=_OLD),
    Column(key="flops_per_token", title="FLOPs", value=_measured("flops_per_token"),
           text=short, better="less",
           missing="the operations of the model could not be counted"),
    _timed("prefill_tokens_per_second", "prompt/s", "more"),
    _timed("first_token_seconds", "first ms", "less"),
    _timed("token_seconds", "ms/token", "less"),
    _timed("token_seconds_p95", "p95", "less"),
    Column(key="memory_bytes", title="memory", value=_speed("memory_bytes"), text=size,
           group="batch 1", better="less", depends_on="machine",
           missing="it was not timed, or took too little to be measured"),
    _timed("token_seconds", "ms/token", "less", batch=8),
    _timed("token_seconds_p95", "p95", "less", batch=8),
    _timed("decode_tokens_per_second", "tokens/s", "more", batch=8),
)  # fmt: skip
"""What it costs to run a model."""


def groups_of(columns: tuple[Column, ...]) -> list[tuple[str, int]]:
    """The groups of neighbouring columns and how many columns each has, in order."""
    found: list[tuple[str, int]] = []
    for column in columns:
        if found and found[-1][0] == column.group:
            found[-1] = (column.group, found[-1][1] + 1)
        else:
            found.append((column.group, 1))
    return found


def warnings(rows: Sequence[ModelFigures]) -> list[str]:
    """Reasons why figures do not compare or are out of date, one line each."""
    found = _stale(rows)
    stores, machines = heldout_groups(rows), machine_groups(rows)
    if len(stores) > 1:
        models = " against ".join(_shortly(names, rows) for names in stores.values())
        others = any(row.tokens for row in rows)
        but = " (bits per byte do, across different tokens of one text)" if others else ""
        found.append(
            f"measured on {len(stores)} different held-out stores, so their figures do not "
            f"compare{but}: {models}"
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
    told = _grouped((sentence, row.name) for row in rows for sentence in row.caveats)
    found += [f"{_shortly(names, rows)}: {sentence}." for sentence, names in told.items()]
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
    for column in (*quality_columns(rows), *COST):
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


_NOTE = 100
"""Width of a line below the tables, in characters."""


def cost_title(rows: Sequence[ModelFigures]) -> str:
    """Title of the table of costs, with the machines that models were timed on."""
    machines = "; ".join(machine_groups(rows))
    return f"What it costs to run ({machines})" if machines else "What it costs to run"


def tables(rows: Sequence[ModelFigures]) -> str:
    """Both tables for a terminal, numbers to the right, and notes below."""
    parts = [_aligned(quality_columns(rows), rows), f"{cost_title(rows)}\n{_aligned(COST, rows)}"]
    wrapped = [textwrap.fill(note, _NOTE) for note in [*notes(rows), *missing(rows)]]
    return "\n\n".join([*parts, "\n".join(wrapped)] if wrapped else parts)


def markdown(rows: Sequence[ModelFigures]) -> str:
    """Warnings, both tables and notes as a part of a Markdown document."""
    parts = [f"**{warning}**\n" for warning in warnings(rows)]
    parts.append(_marked_down(quality_columns(rows), rows))
    parts += [f"{cost_title(rows)}:\n", _marked_down(COST, rows)]
    return "\n".join([*parts, *(f"{note}\n" for note in [*notes(rows), *missing(rows)])])


def _aligned(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> str:
    lines = [["model", *(one.title for one in columns)]]
    for row in rows:
        name = ("  " if row.is_export else "") + row.short_name
        lines.append([name, *(one.cell(row) for one in columns)])
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = ["  ".join(map(_padded, line, widths, range(len(line)))).rstrip() for line in lines]
    above = _group_line(columns, widths)
    return "\n".join([above, *text] if above else text)


def _padded(text: str, width: int, column: int) -> str:
    """The first column to the left, others to the right; wide letters take two places."""
    blank = " " * (width - display_width(text))
    return blank + text if column else text + blank


def _group_line(columns: tuple[Column, ...], widths: Sequence[int]) -> str:
    """The names of groups, each over the middle of its columns."""
    parts = [" " * widths[0]]
    place = 1
    for group, count in groups_of(columns):
        wide = sum(widths[place : place + count]) + 2 * (count - 1)
        parts.append(f" {group} ".center(wide, "-") if group else " " * wide)
        place += count
    return "  ".join(parts).rstrip()


def _marked_down(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> str:
    titles = [f"{one.title} ({one.group})" if one.group else one.title for one in columns]
    # Markdown drops blanks at the start of a cell: an export is shown by its whole name
    cells = [[row.name, *(one.cell(row) for one in columns)] for row in rows]
    lines = [["model", *titles], ["---", *["---:"] * len(columns)], *cells]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
