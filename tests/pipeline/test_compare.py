"""`coldstill compare`: all models of a run, or of several."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.rows import compared_rows
from coldstill.pipeline.results.tables import tables
from compared import CACHED, Made, generation, models_of, write_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

MEASURED = {
    "parameters", "bytes", "positions", "loss", "perplexity", "bits_per_byte", "kl", "agreement",
    "accuracy", "acceptance", "ece", "flops_per_token",
}  # fmt: skip


def test_every_figure_is_printed_as_json_and_written_beside_the_run(finished: Desk) -> None:
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        (finished.run / name).unlink()
    result = finished.done("compare", "r.toml", "--json")
    assert result.stderr == "compare: plots: runs/r/comparison.html; open it in a browser\n"
    rows = json.loads(result.stdout)
    assert finished.json("comparison.json") == rows
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline"}
    for row in rows:
        assert row.keys() - {CACHED} == MEASURED | {
            "name", "role", "calibration", "generation", "dtype", "machine", "runtime", "weights",
            "heldout",
        }  # fmt: skip
        assert all(isinstance(row[key], (int, float)) for key in MEASURED)
        assert sum(one["count"] for one in row["calibration"]) == row["positions"]
        assert row["parameters"] > 0
        assert row["bytes"] > 4 * row["parameters"] * 0.9
        assert row["perplexity"] == pytest.approx(2.718281828 ** row["loss"], rel=1e-6)
        assert 0 <= row["agreement"] <= 1
        assert 0 <= row["ece"] <= 1
        assert [one["batch"] for one in row["generation"]] == [1, 8]
        assert all(one["token_seconds"] > 0 for one in row["generation"])
    teacher, *students = rows
    assert (teacher["kl"], teacher["agreement"], teacher["acceptance"]) == (0.0, 1.0, 1.0)
    assert [row["loss"] for row in students] == sorted(row["loss"] for row in students)
    assert all(row["kl"] > 0 for row in students)
    # bytes a position of the store a student was trained from: 0 without a teacher
    store = open_store(finished.run / "logits")
    files = (finished.run / "logits" / "shards").glob("*.arrow")
    cached = {row["name"]: row.get(CACHED) for row in rows}
    stored = sum(path.stat().st_size for path in files) / store.positions
    assert cached == {"teacher": None, "small": pytest.approx(stored), "baseline": 0}
    page = (finished.run / "comparison.html").read_text(encoding="utf-8")
    assert all(f"<bdi>{row['name']}</bdi>" in page for row in rows)
    text = (finished.run / "comparison.md").read_text(encoding="utf-8")
    quality, title, cost, *missing = text.split("\n\n")
    assert title == f"What it costs to run ({teacher['machine']}):"
    for table in (quality, cost):
        lines = table.splitlines()
        assert len(lines) == 2 + 3
        assert len({line.count("|") for line in lines}) == 1
        assert lines[2].startswith("| teacher | ")
    assert missing
    assert all(line.startswith("No ") and ": " in line for line in missing)


@pytest.mark.parametrize("lost", ["deleted", "another"])
def test_the_size_of_a_missing_store_is_not_known(finished: Desk, lost: str) -> None:
    for path in finished.run.glob("students/*/evaluation.json"):
        path.unlink()
    shutil.rmtree(finished.run / "logits")
    if lost == "another":
        finished.done("teacher-logits", "r.toml", "--set", "logits.tail=9")
    result = finished.done("evaluate", "r.toml")
    note = "evaluate small: the size of what it was trained from is not known: runs/r/logits"
    assert result.stderr.count(note) == 1
    assert finished.json("students", "small", "evaluation.json")[CACHED] is None
    assert finished.json("students", "baseline", "evaluation.json")[CACHED] == 0
    assert " - " in finished.done("compare", "r.toml").stdout


def test_figures_of_an_older_version_are_compared_and_measured_again(finished: Desk) -> None:
    paths = [*finished.run.glob("students/*/evaluation.json")]
    paths.append(finished.run / "teacher.evaluation.json")
    new = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for path, figures in new.items():
        newer = {CACHED, "calibration", "bits_per_byte", "flops_per_token", "generation"}
        old = {key: figures[key] for key in figures if key not in newer}
        path.write_text(json.dumps(old), encoding="utf-8")
    result = finished.done("compare", "r.toml")
    assert "no calibration in older figures of teacher, " in result.stderr
    assert "coldstill evaluate measures them again" in result.stderr
    assert len(models_of(result.stdout)) == 3
    page = (finished.run / "comparison.html").read_text(encoding="utf-8")
    assert "Left out: " in page
    finished.done("evaluate", "r.toml")
    for path, figures in new.items():
        again = json.loads(path.read_text(encoding="utf-8"))
        assert again.keys() == figures.keys()
        assert all(again[key] == figures[key] for key in figures.keys() - {"generation"})
    assert "older" not in finished.done("compare", "r.toml").stderr


@pytest.fixture
def room(tmp_path: Path, make_desk: Callable[[Path], Desk]) -> Desk:
    """Two runs that share a teacher and a held-out store, and one that does not."""
    small, alone = Made(name="small"), Made(name="alone", loss=5.5, cached=0.0)
    write_run(tmp_path / "runs", "a", [small, alone])
    write_run(tmp_path / "runs", "b", [Made(name="small", loss=4.95, cached=17.0)], size=10_000)
    write_run(tmp_path / "runs", "c", [Made(name="small", loss=4.0)], heldout="beef")
    return make_desk(tmp_path)


def test_models_of_several_runs_are_named_by_run_and_sorted_together(room: Desk) -> None:
    before = room.snapshot()
    result = room.done("compare", "a", "runs/b", "--json")
    rows = json.loads(result.stdout)
    names = ["teacher", "b/small", "a/small", "a/alone"]  # one teacher, though its speed differs
    assert [row["name"] for row in rows] == names
    assert [row["role"] for row in rows] == ["teacher", *["student"] * 3]
    assert result.stderr == ""
    printed = room.done("compare", "a", "b").stdout
    assert models_of(printed) == names
    assert room.snapshot() == before  # the comparison of several runs is not written
    assert (
        tables(compared_rows([Run(room.root / "runs" / name) for name in "ab"])) + "\n" == printed
    )
    # runs of one name are told apart by the ends of their folders
    write_run(room.root / "else", "a", [Made(name="small", loss=5.2)])
    rows = json.loads(room.done("compare", "runs/a", "else/a", "--json").stdout)
    assert [row["name"] for row in rows[1:]] == ["runs/a/small", "else/a/small", "runs/a/alone"]


def test_every_teacher_has_its_row_and_other_stores_are_warned_of(room: Desk) -> None:
    result = room.done("compare", "a", "b", "c", "--html", "pages/p.html")
    assert result.stderr.splitlines() == [
        "compare: warning: measured on 2 different held-out stores, so their figures do not "
        "compare: a, b against c",
        "compare: plots: pages/p.html; open it in a browser",
    ]
    names = models_of(result.stdout)
    assert names == ["a/teacher", "c/teacher", "c/small", "b/small", "a/small", "a/alone"]
    page = (room.root / "pages" / "p.html").read_text(encoding="utf-8")
    assert "do not compare: a, b against c" in page
    assert room.done("compare", "a", "b", "c", "--html", "pages/p.html").stdout == result.stdout
    assert (room.root / "pages" / "p.html").read_text(encoding="utf-8") == page


def test_one_run_may_be_changed_and_have_its_page_elsewhere(room: Desk) -> None:
    room.done("compare", "a", "--set", "seed=3", "--html", "p.html")
    beside = room.root / "runs" / "a" / "comparison.html"
    assert (room.root / "p.html").read_bytes() == beside.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a", "runs/a"], "error: runs/a: named twice; name every run once"),
        (["a", "b", "./runs/../runs/a"], "named twice, also as runs/a; name every run once"),
        (["a", "d"], "error: runs/d: no student is evaluated yet; run coldstill evaluate"),
        (["a", "nowhere"], "error: nowhere: no recipe file, no run folder and no built-in"),
        (["a", "b", "--html", "runs"], "error: runs: a folder; name the file that the page is to"),
        (["a", "--html", "runs"], "error: runs: a folder; name the file that the page is to be"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    room: Desk, arguments: list[str], line: str
) -> None:
    write_run(room.root / "runs", "d", [])
    assert line in room.refused("compare", *arguments)


SPEED = generation(1000)[0]
BIN = {"count": 1, "confidence": 0.5, "accuracy": 0.5}


def test_damaged_figures_are_refused(room: Desk) -> None:
    path = room.root / "runs" / "b" / "students" / "small" / "evaluation.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    damages: list[dict[str, Any]] = [
        {"loss": "low"}, {"loss": None}, {"kl": True}, {"parameters": float("nan")},
        {"accuracy": None}, {"bytes": -1}, {"machine": 5}, {"dtype": None},
        {"generation": [{"batch": 1}]}, {"generation": [{**SPEED, "memory_bytes": "x"}]},
        {CACHED: "42"}, {"calibration": 3}, {"calibration": [{"count": 1}]},
        {"calibration": [{**BIN, "confidence": "x"}]}, {"loss": float("inf")}, {"heldout": 5},
    ]  # fmt: skip
    runs = [Run(room.root / "runs" / name) for name in "ab"]
    for damage in damages:
        path.write_text(json.dumps({**figures, **damage}), encoding="utf-8")
        with pytest.raises(ColdstillError, match=r"small/evaluation\.json: damaged; delete it"):
            compared_rows(runs)
    assert room.refused("compare", "a", "b") == (
        "error: runs/b/students/small/evaluation.json: damaged; delete it and run coldstill "
        "evaluate"
    )
    path.write_text(json.dumps({**figures, "calibration": [BIN]}), encoding="utf-8")
    assert len(compared_rows(runs)) == 4
    teacher = room.root / "runs" / "a" / "teacher.evaluation.json"
    for content, why in (
        ("", "damaged; delete it and"),
        ("[", "damaged; delete it and"),
        (None, "not there;"),
    ):
        teacher.unlink()
        if content is not None:
            teacher.write_text(content, encoding="utf-8")
        assert room.refused("compare", "a") == (
            f"error: runs/a/teacher.evaluation.json: {why} run coldstill evaluate"
        )


def test_damaged_figures_of_an_export_are_refused(room: Desk) -> None:
    root = write_run(room.root / "runs", "x", [Made(name="small", exports=("onnx",))])
    path = root / "students" / "small" / "exports" / "onnx" / "export.json"
    saved = path.read_text(encoding="utf-8")
    for *above, key, value in (
        ("costs", "machine", 5),
        ("costs", "bytes", -5),
        ("check", "kl", "far"),
        ("sample", "export", "positions", "many"),
        ("sample", "export", "loss", 1e9),
        ("sample", "export", "loss", float("nan")),
        ("costs", "generation", [{**SPEED, "memory_bytes": "x"}]),
    ):
        record = table = json.loads(saved)
        for name in above:
            table = table[name]
        table[key] = value
        path.write_text(json.dumps(record), encoding="utf-8")
        line = room.refused("compare", "x")
        assert line.startswith("error: runs/x/students/small/exports/onnx/export.json: damaged; ")
        assert line.endswith("run coldstill export")


def test_a_copied_run_is_identified_by_its_folder(finished: Desk) -> None:
    (finished.root / "r.toml").unlink()
    copy = finished.root / "runs" / "copy"
    shutil.copytree(finished.run, copy)
    (copy / "students" / "small" / "evaluation.json").unlink()
    # a student that is not evaluated has no row
    rows = json.loads(finished.done("compare", "copy", "--json").stdout)
    assert [row["name"] for row in rows] == ["teacher", "baseline"]
    assert len(json.loads(finished.done("compare", "copy", "r", "--json").stdout)) == 4
    finished.done("export", "copy", "small", "--to", "hf")
    assert (copy / "students" / "small" / "exports" / "hf").is_dir()
    assert not (finished.run / "students" / "small" / "exports").exists()
    shutil.rmtree(copy / "students" / "small" / "model")
    line = finished.refused("export", "copy", "small", "--to", "hf")
    assert line.endswith("coldstill train-student runs/copy --student small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "Missing argument 'RUN...'"),
        (["compare", "a", "b", "--set", "seed=1"], "--set changes one recipe; name a single RUN"),
    ],
)
def test_wrong_usage_is_reported(room: Desk, arguments: list[str], message: str) -> None:
    result = room.coldstill(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_names_of_folders_move_no_cursor(room: Desk) -> None:
    strange = "x\x1b[31m\u202e|y"
    shutil.copytree(room.root / "runs" / "b", room.root / "runs" / strange)
    printed = room.done("compare", "a", f"runs/{strange}", "--html", "p.html").stdout
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "x\ufffd[31m\ufffd|y/small" in printed
