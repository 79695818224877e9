"""The comparison: what every model of a run, or of several, is worth, side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .run import Run, StudentFolder

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
_NEWER = (CACHED_BYTES, TOKEN_SECONDS, "bits_per_byte", "calibration")
"""Keys that figures of older versions lack."""
_BIN = {"count", "confidence", "accuracy"}
_SPEED = {"batch", "token_seconds"}


def compare(runs: Sequence[Run]) -> list[Row]:
    """A row for each teacher, then one for every evaluated student and each of its exports, the
    lowest loss first.

    Of one run the comparison is also written beside it, as JSON, Markdown and a page. Of several,
    models are called RUN/NAME; a teacher whose figures two runs share has one row.

    Raises
        ColdstillError: as `compared_rows`
    """
    rows = compared_rows(runs)
    if len(runs) == 1:
        _write_beside(runs[0], rows)
    return rows


def compared_rows(runs: Sequence[Run]) -> list[Row]:
    """The same rows, and nothing is written.

    Raises
        ColdstillError: a run has nothing evaluated yet or is named twice, or figures are damaged
    """
    _expect_each_once(runs)
    teachers: list[Row] = []
    students: list[Row] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        names = _evaluated(run)
        teacher = _read(run.teacher_evaluation, "teacher", label)
        if not any(_same_figures(teacher, other) for other in teachers):
            teachers.append(teacher)
        for name in names:
            students.append(_read(run.student(name).evaluation, name, label))
            students += _exports(run.student(name), label)
    if len(teachers) == 1:
        teachers[0]["name"] = "teacher"  # everybody's
    return [*teachers, *sorted(students, key=lambda row: float(row["loss"]))]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """What the runs are called in front of their models: nothing where there is one, else as much
    of their folders' ends as tells them apart."""
    if len(runs) == 1:
        return [""]
    paths = [run.root.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            break
    return [visible(end) for end in ends]


def labelled(run_label: str, name: str) -> str:
    """What a model is called in every output."""
    return f"{run_label}/{name}" if run_label else name


def visible(text: str) -> str:
    """A name of the file system as it may be shown: nothing in it moves a cursor."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these figures: a line each."""
    groups = heldout_groups(rows)
    if len(groups) < 2:
        return []
    told = " against ".join(_in_few_words(group, rows) for group in groups)
    return [
        f"measured on {len(groups)} different held-out stores, so their figures do not compare: "
        f"{told}"
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


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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


def _expect_each_once(runs: Sequence[Run]) -> None:
    seen: dict[Path, Path] = {}
    for run in runs:
        where = run.root.resolve()
        if where in seen:
            also = "" if seen[where] == run.root else f", also as {seen[where]}"
            raise ColdstillError(f"{run.root}: named twice{also}; name every run once")
        seen[where] = run.root


def _evaluated(run: Run) -> list[str]:
    names = [name for name in run.student_names if run.student(name).evaluation.exists()]
    if not names:
        raise ColdstillError(f"{run.root}: no student is evaluated yet; run coldstill evaluate")
    return names


def _read(path: Path, name: str, run_label: str) -> Row:
    """A row from its file; raises ColdstillError if a figure is missing or is no number."""
    row = read_json(path)
    if not isinstance(row, dict) or not _is_whole(row):
        raise ColdstillError(f"{path}: damaged; delete it and run coldstill evaluate")
    role = "teacher" if name == "teacher" else "student"
    label = {"run": run_label} if run_label else {}
    label["name"] = labelled(run_label, visible(name))
    return {**row, **label, "role": role, TOKEN_SECONDS: _alone(row)}


def _exports(folder: StudentFolder, run_label: str) -> list[Row]:
    """A row for each format that a student was exported to."""
    from .export import export_rows  # which needs the keys of this file

    rows = []
    for row in export_rows(folder):
        if not _is_whole(row):
            raise ColdstillError(
                f"{folder.exports}: damaged figures; delete the export and run coldstill export"
            )
        name = labelled(run_label, visible(str(row["name"])))
        run = {"run": run_label} if run_label else {}
        rows.append({**row, **run, "name": name, "role": "export", TOKEN_SECONDS: _alone(row)})
    return rows


def _alone(row: Mapping[str, Any]) -> float | None:
    """Seconds a token where one text is written at a time."""
    speeds = row.get("generation") or ()
    return next((float(s["token_seconds"]) for s in speeds if s["batch"] == 1), None)


def _is_whole(row: Mapping[str, Any]) -> bool:
    figures = [row.get(key) for key, _ in COLUMNS if key not in ("name", *_NEWER)]
    optional = [row.get(key) for key in (CACHED_BYTES, "bits_per_byte", "flops_per_token")]
    bins, speeds = row.get("calibration", []), row.get("generation", [])
    return (
        all(_is_number(value) for value in figures)
        and all(value is None or _is_number(value) for value in optional)
        and isinstance(speeds, list)
        and all(isinstance(s, dict) and s.keys() >= _SPEED for s in speeds)
        and all(_is_number(speed[key]) for speed in speeds for key in _SPEED)
        and isinstance(bins, list)
        and all(isinstance(one, dict) and one.keys() >= _BIN for one in bins)
        and all(one[key] is None or _is_number(one[key]) for one in bins for key in _BIN)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same_figures(teacher: Row, other: Row) -> bool:
    """Whether two runs have one teacher evaluation: of one held-out store, speed may differ."""
    keys = ("heldout", "parameters", "loss", "accuracy")
    return all(teacher.get(key) == other.get(key) for key in keys)


def _in_few_words(names: Sequence[str], rows: Sequence[Row]) -> str:
    """These models, or their runs if no other model is of those."""
    inside = [row for row in rows if row["name"] in names]
    runs = {row.get("run") for row in inside}
    if None not in runs and not any(row.get("run") in runs for row in rows if row not in inside):
        names = sorted(str(run) for run in runs)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _write_beside(run: Run, rows: Sequence[Row]) -> None:
    from .comparison.page import write_page  # which needs all of the above

    write_json(run.comparison, rows)
    with whole_file(run.comparison.with_suffix(".md")) as scratch:
        scratch.write_text(markdown(rows), encoding="utf-8")
    write_page(run.comparison.with_suffix(".html"), [run], rows)
