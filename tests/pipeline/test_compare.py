"""The table of all models of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from coldstill.pipeline.compare import markdown, size, table

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

ROW = {
    "name": "a-long-name",
    "parameters": 1234567,
    "bytes": 2_500_000,
    "loss": 1.23456,
    "perplexity": 3.4567,
    "kl": 0.01,
    "agreement": 0.5,
    "acceptance": 0.75,
    "ece": 0.01234,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 0,
}


def test_compare_gives_a_list_of_objects_with_every_figure(finished: Desk) -> None:
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert rows[0]["name"] == "teacher"
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline"}
    for row in rows:
        assert row.keys() >= ROW.keys()
        assert all(isinstance(row[key], (int, float)) for key in ROW if key != "name")
        assert row["parameters"] > 0
        assert row["bytes"] > 4 * row["parameters"] * 0.9
        assert row["perplexity"] == pytest.approx(2.718281828 ** row["loss"], rel=1e-6)
        assert 0 <= row["agreement"] <= 1
        assert 0 <= row["ece"] <= 1
        assert row["tokens_per_second"] > 0
    teacher, *students = rows
    assert (teacher["kl"], teacher["agreement"], teacher["acceptance"]) == (0.0, 1.0, 1.0)
    assert [row["loss"] for row in students] == sorted(row["loss"] for row in students)
    assert all(row["kl"] > 0 for row in students)


def test_the_table_is_also_written_as_json_and_markdown(finished: Desk) -> None:
    for name in ("comparison.json", "comparison.md"):
        (finished.run / name).unlink()
    printed = finished.done("compare", "r.toml", "--json").stdout
    assert finished.json("comparison.json") == json.loads(printed)
    lines = (finished.run / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| teacher | ")


def test_a_student_that_is_not_evaluated_yet_is_left_out(finished: Desk) -> None:
    (finished.run / "students" / "small" / "evaluation.json").unlink()
    names = [row["name"] for row in json.loads(finished.done("compare", "r.toml", "--json").stdout)]
    assert names == ["teacher", "baseline"]


def test_columns_line_up_with_numbers_to_the_right() -> None:
    text = table([{**ROW, "name": "t"}, {**ROW, "parameters": 1}])
    head, rule, first, second = text.splitlines()
    assert rule.replace(" ", "").strip("-") == ""
    assert first.split()[:4] == ["t", "1,234,567", "2.5", "MB"]
    end = head.index("parameters") + len("parameters")
    assert first[:end].endswith(" 1,234,567")
    assert second[:end].endswith("         1")
    assert "1.2346" in first
    assert "50.0%" in first
    assert first.endswith(" -")


def test_markdown_has_a_cell_for_each_figure() -> None:
    lines = markdown([ROW]).splitlines()
    assert [line.count("|") for line in lines] == [len(ROW) + 1] * 3


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
