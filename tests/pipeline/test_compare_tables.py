"""The two tables as text, and the warnings and notes beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.rows import compared_rows
from coldstill.pipeline.results.tables import COST, QUALITY, markdown, notes, tables, warnings
from coldstill.pipeline.units import size
from compared import CACHED, FORMATS, Made, generation, models_of, row, write_run

if TYPE_CHECKING:
    from pathlib import Path


def only_one(**more: Any) -> Any:
    """A row that was timed with one text, on a machine that is not known."""
    speed = generation(1_234_567, batches=(1,))[0]
    speed |= {
        "prefill_tokens_per_second": 12345.6, "first_token_seconds": 0.0456,
        "token_seconds": 0.00123, "token_seconds_p95": 0.00234, "memory_bytes": None,
    }  # fmt: skip
    known = {
        "parameters": 1_234_567, "bytes": 2_500_000, "dtype": "bf16", "loss": 1.23456, "kl": 0.01,
        "agreement": 0.5, "flops_per_token": 2_469_134, CACHED: 42.34, "machine": "",
        "generation": [speed],
    }  # fmt: skip
    return row(**{**known, **more})


def test_columns_line_up_with_numbers_to_the_right() -> None:
    rows = [only_one(name="t"), only_one(name="a-long-name", parameters=1)]
    quality, cost = tables(rows).split("\n\n")[:2]
    head, rule, first, second = quality.splitlines()
    assert rule.replace(" ", "").strip("-") == ""
    assert first.split()[:5] == ["t", "1,234,567", "42.3", "B", "1.2346"]
    end = head.index("parameters") + len("parameters")
    assert first[:end].endswith(" 1,234,567")
    assert second[:end].endswith("         1")
    title, groups, head, rule, first, second = cost.splitlines()
    assert title == "What it costs to run"
    assert head.split() == [
        "model", "precision", "size", "FLOPs", "prompt/s", "first", "ms", "ms/token", "p95",
        "memory", "ms/token", "p95", "tokens/s",
    ]  # fmt: skip
    figures = ["bf16", "2.5", "MB", "2.47M", "12,346", "45.60", "1.23", "2.34", *"----"]
    assert first.split() == ["t", *figures]
    # each group stands over its own columns
    start, end = head.index("prompt/s"), head.index("memory") + len("memory")
    assert groups[:start].strip() == ""
    assert groups[start:end].strip("- ") == "batch 1"
    assert groups[end:].strip("- ") == "batch 8"
    assert len(groups) == len(head)
    # wide letters take two columns of a terminal
    lines = tables([row("abcd"), row("\u65e5\u672c")]).split("\n\n")[0].splitlines()[2:]
    assert lines[0].removeprefix("abcd") == lines[1].removeprefix("\u65e5\u672c")


def test_the_tables_of_a_run_with_every_export_fit_a_terminal(tmp_path: Path) -> None:
    students = [Made(name="small", exports=FORMATS), Made(name="bare", loss=5.5, cached=0.0)]
    run = Run(write_run(tmp_path, "a", students))
    rows = compared_rows([run])
    text = tables(rows)
    assert max(map(len, text.splitlines())) <= 120
    assert [one.name for one in rows] == [
        "teacher", "small", *(f"small ({name})" for name in FORMATS), "bare",
    ]  # fmt: skip
    assert models_of(text) == ["teacher", "small", *FORMATS, "bare"]
    quality, cost, below = text.split("\n\n")
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
    assert (
        "cached: not known for teacher: only a student that was trained from a store has read"
        in below
    )
    assert below.count("the held-out store does not tell how many bytes its text has") == 1


def test_markdown_has_a_cell_for_each_figure() -> None:
    quality, _, cost = markdown([row("x|y")]).split("\n\n")[:3]
    for table, columns in ((quality, QUALITY), (cost, COST)):
        lines = [line.replace("\\|", "") for line in table.splitlines()]
        assert [line.count("|") for line in lines] == [len(columns) + 2] * 3
        assert table.splitlines()[2].startswith("| x\\|y | ")
    assert "| ms/token (batch 1) |" in cost


def test_unknown_figures_are_dashes_with_a_reason_and_rounding_leaves_no_sign() -> None:
    lacking = row(
        "x", kl=-1e-7, ece=-1e-7, bytes=0, dtype="", flops_per_token=None, machine="",
        generation=generation(926_336, batches=(8,)),
    )  # fmt: skip
    quality, cost, below = tables([lacking]).split("\n\n")
    assert " 0.0000 " in quality
    assert "-0.0" not in quality
    assert cost.splitlines()[-1].split() == ["x", *"--------", "8.61", "10.33", "929"]
    below = " ".join(below.split())
    assert "FLOPs: not known for x: the operations of the model could not be counted." in below
    assert below.count("it was not timed at that batch size") == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e9, "5.0 GB"),
        (7.2e12, "7.2 TB"), (7.2e15, "7200.0 TB"),
    ],
)  # fmt: skip
def test_sizes_have_a_unit_that_fits(count: float, text: str) -> None:
    assert size(count) == text


def test_figures_of_different_held_out_stores_are_warned_of() -> None:
    rows = [row(name, heldout=store) for name, store in (("a", "1"), ("b", "1"), ("c", "2"))]
    assert warnings(rows)[0].endswith("do not compare: a, b against c")
    assert warnings(rows[:2]) == []
    assert warnings([row("older", heldout=None), *rows[:2]]) == []
    many = [row(f"m{i}", heldout=str(i > 0)) for i in range(12)]
    assert warnings(many)[0].endswith("m0 against m1, m2, m3, m4, m5, m6 and 5 more")


def test_speed_on_other_machines_is_warned_of_and_other_precision_noted() -> None:
    rows = [row(name) for name in "ab"]
    assert (warnings(rows), notes(rows)) == ([], [])
    other = row("c", machine="a phone", dtype="bf16")
    assert warnings([*rows, other]) == [
        "measured on 2 different machines, so speed and memory do not compare: a, b (2 CPU "
        "threads) against c (a phone)"
    ]
    precision = ["Weights are bf16 and fp32: precision changes speed and memory as size does."]
    assert notes([*rows, other]) == precision
    # without timing the machine does not matter
    assert warnings([*rows, other.model_copy(update={"generation": ()})]) == []


def test_an_export_of_other_weights_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", [Made(name="small", exports=("hf", "onnx"))])
    path = folder / "students" / "small" / "exports" / "onnx" / "export.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**saved, "student": {"fingerprint": "older"}}), encoding="utf-8")
    rows = compared_rows([Run(folder)])
    assert [one.name for one in rows] == ["teacher", "small", "small (hf)"]
    assert warnings(rows) == [
        "small: its export onnx was made from other weights than its figures, so it is left out; "
        "run coldstill evaluate, and if that changes nothing delete the export and run coldstill "
        "export"
    ]
    # the warning goes along with pasted tables
    assert markdown(rows).startswith(f"**{warnings(rows)[0]}**\n\n| model ")
