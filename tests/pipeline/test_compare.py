"""The table of all models of a run, or of several."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.table import markdown, tables
from coldstill.pipeline.steps.comparison import compare
from compared import ROW, SPEED, Made, models_of, write_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

CACHED = "cached_bytes_per_position"


def test_compare_gives_a_list_of_objects_with_every_figure(finished: Desk) -> None:
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert rows[0]["name"] == "teacher"
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline"}
    for row in rows:
        measured = ROW.keys() - {"name", "dtype", "generation"}
        if row["name"] == "teacher":
            measured -= {"cached_bytes_per_position"}
        assert row.keys() >= measured
        assert all(isinstance(row[key], (int, float)) for key in measured)
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


def test_the_table_is_also_written_as_json_and_markdown(finished: Desk) -> None:
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        (finished.run / name).unlink()
    result = finished.done("compare", "r.toml", "--json")
    assert result.stderr == ("compare: plots: runs/r/comparison.html; open it in a browser\n")
    printed = result.stdout
    page = (finished.run / "comparison.html").read_text(encoding="utf-8")
    assert all(f"<bdi>{row['name']}</bdi>" in page for row in json.loads(printed))
    assert finished.json("comparison.json") == json.loads(printed)
    text = (finished.run / "comparison.md").read_text(encoding="utf-8")
    quality, title, cost, *missing = text.split("\n\n")
    assert title == f"What it costs to run ({json.loads(printed)[0]['machine']}):"
    for table in (quality, cost):
        lines = table.splitlines()
        assert len(lines) == 2 + 3
        assert len({line.count("|") for line in lines}) == 1
        assert lines[2].startswith("| teacher | ")
    assert missing
    assert all(line.startswith("No ") and ": " in line for line in missing)


def test_a_student_that_is_not_evaluated_yet_is_left_out(finished: Desk) -> None:
    (finished.run / "students" / "small" / "evaluation.json").unlink()
    names = [row["name"] for row in json.loads(finished.done("compare", "r.toml", "--json").stdout)]
    assert names == ["teacher", "baseline"]


def test_what_a_student_was_trained_from_is_told_in_bytes_a_position(finished: Desk) -> None:
    store = open_store(finished.run / "logits")
    files = (finished.run / "logits" / "shards").glob("*.arrow")
    stored = sum(path.stat().st_size for path in files)
    rows = {row["name"]: row for row in json.loads(finished.done("compare", "r", "--json").stdout)}
    assert rows["small"]["cached_bytes_per_position"] == pytest.approx(stored / store.positions)
    assert rows["baseline"]["cached_bytes_per_position"] == 0  # it listens to nobody
    assert "cached_bytes_per_position" not in rows["teacher"]


@pytest.mark.parametrize("lost", ["deleted", "another"])
def test_the_size_of_a_store_that_is_gone_is_not_known(finished: Desk, lost: str) -> None:
    for path in finished.run.glob("students/*/evaluation.json"):
        path.unlink()
    shutil.rmtree(finished.run / "logits")
    if lost == "another":
        finished.done("teacher-logits", "r.toml", "--set", "logits.tail=9")
    result = finished.done("evaluate", "r.toml")
    told = "evaluate small: the size of what it was trained from is not known: runs/r/logits"
    assert result.stderr.count(told) == 1
    assert finished.json("students", "small", "evaluation.json")[CACHED] is None
    assert finished.json("students", "baseline", "evaluation.json")[CACHED] == 0
    assert " - " in finished.done("compare", "r.toml").stdout


def test_figures_of_an_older_version_are_compared_and_measured_anew(finished: Desk) -> None:
    paths = [*finished.run.glob("students/*/evaluation.json")]
    paths.append(finished.run / "teacher.evaluation.json")
    new = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for path, figures in new.items():
        newer = {CACHED, "calibration", "bits_per_byte", "flops_per_token", "generation"}
        old = {key: figures[key] for key in figures if key not in newer}
        path.write_text(json.dumps(old), encoding="utf-8")
    result = finished.done("compare", "r.toml")
    assert "no calibration in older figures of teacher, " in result.stderr
    assert "coldstill evaluate measures them anew" in result.stderr
    assert len(models_of(result.stdout)) == 3
    page = (finished.run / "comparison.html").read_text(encoding="utf-8")
    assert "Left out: " in page
    finished.done("evaluate", "r.toml")
    clocks = {"generation"}
    for path, figures in new.items():
        again = json.loads(path.read_text(encoding="utf-8"))
        assert again.keys() == figures.keys()
        assert all(again[key] == figures[key] for key in figures.keys() - clocks)
    assert "older" not in finished.done("compare", "r.toml").stderr


@pytest.fixture
def room(tmp_path: Path, make_desk: Callable[[Path], Desk]) -> Desk:
    """A desk with two runs that share a teacher and a held-out store, and one that does not."""
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
    assert models_of(room.done("compare", "a", "b").stdout) == names
    assert room.snapshot() == before  # of several runs nothing is written unless asked for


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
    again = room.done("compare", "a", "b", "c", "--html", "pages/p.html")
    assert again.stdout == result.stdout
    assert (room.root / "pages" / "p.html").read_text(encoding="utf-8") == page


def test_runs_of_one_name_are_told_apart_by_their_folders(room: Desk) -> None:
    write_run(room.root / "else", "a", [Made(name="small", loss=5.2)])
    rows = json.loads(room.done("compare", "runs/a", "else/a", "--json").stdout)
    assert [row["name"] for row in rows[1:]] == ["runs/a/small", "else/a/small", "runs/a/alone"]


def test_one_run_may_be_changed_and_have_its_page_elsewhere(room: Desk) -> None:
    room.done("compare", "a", "--set", "seed=3", "--html", "p.html")
    beside = room.root / "runs" / "a" / "comparison.html"
    assert (room.root / "p.html").read_bytes() == beside.read_bytes()


def test_it_can_be_called_from_python(room: Desk) -> None:
    runs = [Run(room.root / "runs" / name) for name in "ab"]
    rows = compare(runs)
    assert tables(rows) + "\n" == room.done("compare", "a", "b").stdout
    with pytest.raises(ColdstillError, match="named twice"):
        compare([runs[0], runs[0]])


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
def test_what_cannot_be_compared_is_refused(room: Desk, arguments: list[str], line: str) -> None:
    write_run(room.root / "runs", "d", [])
    assert line in room.refused("compare", *arguments)


@pytest.mark.parametrize(
    "damage",
    [
        {"loss": "low"},
        {"loss": None},
        {"kl": True},
        {"parameters": float("nan")},
        {"accuracy": None},
        {"bytes": -1},
        {"machine": 5},
        {"dtype": None},
        {"generation": [{"batch": 1}]},
        {"generation": [{**SPEED, "memory_bytes": "x"}]},
        {"cached_bytes_per_position": "42"},
        {"calibration": 3},
        {"calibration": [{"count": 1}]},
        {"calibration": [{"count": 1, "confidence": "x", "accuracy": 0.5}]},
    ],
    ids=str,
)
def test_damaged_figures_are_refused(room: Desk, damage: dict[str, Any]) -> None:
    path = room.root / "runs" / "b" / "students" / "small" / "evaluation.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**figures, **damage}), encoding="utf-8")
    line = room.refused("compare", "a", "b")
    assert line == (
        "error: runs/b/students/small/evaluation.json: damaged; delete it and run coldstill "
        "evaluate"
    )


@pytest.mark.parametrize("content", ["", "[", None], ids=["empty", "cut off", "gone"])
def test_figures_that_cannot_be_read_are_told_with_what_mends_them(
    room: Desk, content: str | None
) -> None:
    path = room.root / "runs" / "a" / "teacher.evaluation.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    why = "not there; " if content is None else "damaged; delete it and "
    assert room.refused("compare", "a") == (
        f"error: runs/a/teacher.evaluation.json: {why}run coldstill evaluate"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("costs", "machine"), 5),
        (("costs", "bytes"), -5),
        (("check", "kl"), "far"),
        (("sample", "export", "positions"), "many"),
        (("sample", "export", "loss"), 1e9),
        (("sample", "export", "loss"), float("nan")),
        (("costs", "generation"), [{**SPEED, "memory_bytes": "x"}]),
    ],
    ids=str,
)
def test_damaged_figures_of_an_export_are_refused(
    room: Desk, key: tuple[str, ...], value: Any
) -> None:
    root = write_run(room.root / "runs", "x", [Made(name="small", exports=("onnx",))])
    path = root / "students" / "small" / "exports" / "onnx" / "export.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    table = saved
    for name in key[:-1]:
        table = table[name]
    table[key[-1]] = value
    path.write_text(json.dumps(saved), encoding="utf-8")
    line = room.refused("compare", "x")
    assert line.startswith("error: runs/x/students/small/exports")
    assert line.endswith("run coldstill export")
    assert "damaged" in line


def test_a_run_that_was_copied_is_the_folder_that_it_is(finished: Desk) -> None:
    (finished.root / "r.toml").unlink()
    copy = finished.root / "runs" / "copy"
    shutil.copytree(finished.run, copy)
    (copy / "students" / "small" / "evaluation.json").unlink()
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
    ("arguments", "said"),
    [
        (["compare"], "Missing argument 'RUN...'"),
        (["compare", "a", "b", "--set", "seed=1"], "--set is about one recipe; name one RUN"),
    ],
)
def test_wrong_usage_is_told(room: Desk, arguments: list[str], said: str) -> None:
    result = room.coldstill(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_names_of_folders_move_no_cursor(room: Desk) -> None:
    strange = "x\x1b[31m\u202e|y"
    shutil.copytree(room.root / "runs" / "b", room.root / "runs" / strange)
    said = room.done("compare", "a", f"runs/{strange}", "--html", "p.html").stdout
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "x\ufffd[31m\ufffd|y/small" in said
    row = {**ROW, "name": "x|y"}
    assert markdown([row]).splitlines()[2].startswith("| x\\|y | ")
