"""The two tables as text, and what is said beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.caveats import notes, warnings
from coldstill.pipeline.results.table import markdown, tables
from coldstill.pipeline.steps.comparison import compare
from coldstill.pipeline.units import size
from compared import FORMATS, QUALITY, ROW, SPEED, Made, figures, models_of, write_run

if TYPE_CHECKING:
    from pathlib import Path


def test_columns_line_up_with_numbers_to_the_right() -> None:
    quality, cost = tables([{**ROW, "name": "t"}, {**ROW, "parameters": 1}]).split("\n\n")[:2]
    head, rule, first, second = quality.splitlines()
    assert rule.replace(" ", "").strip("-") == ""
    assert first.split()[:4] == ["t", "1,234,567", "42.3", "B"]
    end = head.index("parameters") + len("parameters")
    assert first[:end].endswith(" 1,234,567")
    assert second[:end].endswith("         1")
    assert "1.2346" in first
    assert "50.0%" in first
    title, groups, head, rule, first, second = cost.splitlines()
    assert title == "What it costs to run"  # nobody knows where
    assert head.split() == [
        "model", "precision", "size", "FLOPs", "prompt/s", "first", "ms", "ms/token", "p95",
        "memory", "ms/token", "p95", "tokens/s",
    ]  # fmt: skip
    told = ["bf16", "2.5", "MB", "2.47M", "12,346", "45.60", "1.23", "2.34", *"----"]
    assert first.split() == ["t", *told]
    # each group stands over its own columns
    start, end = head.index("prompt/s"), head.index("memory") + len("memory")
    assert groups[:start].strip() == ""
    assert groups[start:end].strip("- ") == "batch 1"
    assert groups[end:].strip("- ") == "batch 8"
    assert len(groups) == len(head)


def test_the_tables_of_a_run_with_every_export_fit_a_terminal(tmp_path: Path) -> None:
    students = [Made(name="small", exports=FORMATS), Made(name="bare", loss=5.5, cached=0.0)]
    run = Run(write_run(tmp_path, "a", students))
    rows = compare([run])
    said = tables(rows)
    assert max(map(len, said.splitlines())) <= 120
    names = [row["name"] for row in rows]
    assert names == ["teacher", "small", *(f"small ({name})" for name in FORMATS), "bare"]
    assert models_of(said) == ["teacher", "small", *FORMATS, "bare"]
    quality, cost, below = said.split("\n\n")
    assert quality.count("\n  ") == cost.count("\n  ") - 1 == len(FORMATS)  # and the groups
    below = " ".join(below.split())
    assert below.startswith(
        "An export's quality is its student's, plus the difference between both on 8,192 held-out "
        "positions. Run by torch 2.13.0 (models, hf, torchao-int8), onnxruntime 1.23.2 (onnx, "
        "onnx-int8), llama.cpp 0.3.36 (gguf-f16, gguf-q8_0)."
    )
    lines = markdown(rows).splitlines()
    assert "| small (onnx-int8) | 926,336 " in "\n".join(lines)
    assert any(line.startswith("An export's quality") for line in lines)
    assert "No cached of teacher: only what was trained from a store has read one." in below
    assert below.count("the held-out store does not tell how many bytes its text has") == 1


def test_markdown_has_a_cell_for_each_figure() -> None:
    quality, _, cost = markdown([ROW]).split("\n\n")[:3]
    assert [line.count("|") for line in quality.splitlines()] == [len(QUALITY) + 1] * 3
    assert [line.count("|") for line in cost.splitlines()] == [12 + 1] * 3
    assert "| ms/token (batch 1) |" in cost


def test_what_is_not_known_is_a_dash_and_nothing_measured_is_none() -> None:
    lacking = {"name": "x", "parameters": 1, "bytes": 0, "generation": [{**SPEED, "batch": 8}]}
    _, cost, below = tables([lacking]).split("\n\n")
    assert cost.splitlines()[-1].split() == ["x", *"--------", "1.23", "2.34", "813"]
    below = " ".join(below.split())
    assert "No FLOPs of x: the arithmetic of the model could not be counted." in below
    assert below.count("it was not timed at that size of batch") == 1


def test_a_figure_that_rounds_to_nothing_has_no_sign() -> None:
    lines = tables([{**ROW, "kl": -1e-7, "ece": -1e-7}]).splitlines()
    assert " 0.0000 " in lines[2]
    assert "-0.0" not in lines[2]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (5e9, "5.0 GB"),
        (7.2e12, "7.2 TB"),
        (7.2e15, "7200.0 TB"),
    ],
)
def test_sizes_are_told_in_round_figures(count: float, said: str) -> None:
    assert size(count) == said


def test_students_of_one_run_may_be_measured_on_different_stores() -> None:
    rows = [{"name": name, "heldout": store} for name, store in (("a", 1), ("b", 1), ("c", 2))]
    assert warnings(rows)[0].endswith("do not compare: a, b against c")
    assert warnings(rows[:2]) == []
    assert warnings([{"name": "of an older version"}, *rows[:2]]) == []
    many = [{"name": f"m{i}", "heldout": i > 0} for i in range(12)]
    assert warnings(many)[0].endswith("m0 against m1, m2, m3, m4, m5, m6 and 5 more")


def test_speed_of_other_machines_is_warned_of_and_of_other_precision_told() -> None:
    rows = [figures(name, 5.0, 1000) for name in "abc"]
    assert warnings(rows) == []
    rows[2] |= {"machine": "a phone", "dtype": "bf16"}
    assert warnings(rows) == [
        "measured on 2 different machines, so speed and memory do not compare: a, b (2 CPU "
        "threads) against c (a phone)"
    ]
    assert notes(rows) == [
        "Weights are bf16 and fp32: precision moves speed and memory as size does."
    ]
    rows[2]["generation"] = []  # of what was not timed the machine says nothing
    assert warnings(rows) == []
    assert notes([rows[0]]) == []


def test_an_export_of_other_weights_is_told_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", [Made(name="small", exports=("hf", "onnx"))])
    path = folder / "students" / "small" / "exports" / "onnx" / "export.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**saved, "student": {"fingerprint": "older"}}), encoding="utf-8")
    rows = compare([Run(folder)])
    assert [row["name"] for row in rows] == ["teacher", "small", "small (hf)"]
    assert warnings(rows) == [
        "small: its export onnx is of other weights than its figures, so it is left out; run "
        "coldstill evaluate, and where that changes nothing delete the export and run coldstill "
        "export"
    ]
    # who pastes the tables takes the warning along
    assert markdown(rows).startswith(f"**{warnings(rows)[0]}**\n\n| model ")


def test_wide_letters_take_two_columns_of_a_terminal() -> None:
    plain, wide = {**ROW, "name": "abcd"}, {**ROW, "name": "\u65e5\u672c"}
    lines = tables([plain, wide]).split("\n\n")[0].splitlines()[2:]
    assert lines[0].removeprefix("abcd") == lines[1].removeprefix("\u65e5\u672c")
