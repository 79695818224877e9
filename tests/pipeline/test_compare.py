"""`coldstill compare`: the models of one run or of several, its tables and its warnings."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.model_tables import COST, QUALITY, markdown, notes, tables, warnings
from coldstill.pipeline.results.rows import compared_rows
from coldstill.pipeline.units import size
from compared import CACHED, FORMATS, Made, generation, models_of, write_run
from compared import row as made_row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

MEASURED = {
    "parameters", "bytes", "positions", "loss", "perplexity", "bits_per_byte", "kl", "agreement",
    "accuracy", "acceptance", "ece", "flops_per_token",
}  # fmt: skip


@pytest.mark.slow
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
            "heldout", "grid", "caveats",
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
    assert all(": not known for " in line for line in missing)


@pytest.mark.slow
def test_the_size_of_a_missing_or_other_store_is_not_known(finished: Desk) -> None:
    note = "evaluate small: the size of what it was trained from is not known: runs/r/logits"
    shutil.rmtree(finished.run / "logits")
    for recapture in (False, True):
        if recapture:
            finished.done("teacher-logits", "r.toml", "--set", "logits.tail=9")
        for path in finished.run.glob("students/*/evaluation.json"):
            path.unlink()
        assert finished.done("evaluate", "r.toml").stderr.count(note) == 1
        assert finished.json("students", "small", "evaluation.json")[CACHED] is None
        assert finished.json("students", "baseline", "evaluation.json")[CACHED] == 0
    assert " - " in finished.done("compare", "r.toml").stdout


@pytest.mark.slow
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
    # runs of one name differ by the ends of their folders
    write_run(room.root / "else", "a", [Made(name="small", loss=5.2)])
    rows = json.loads(room.done("compare", "runs/a", "else/a", "--json").stdout)
    assert [row["name"] for row in rows[1:]] == ["runs/a/small", "else/a/small", "runs/a/alone"]


@pytest.mark.slow
def test_every_teacher_has_its_row_and_other_stores_are_warned_of(room: Desk) -> None:
    strange = "x\x1b[31m\u202e|y"
    shutil.copytree(room.root / "runs" / "b", room.root / "runs" / strange)
    compare = ("compare", "a", f"runs/{strange}", "c", "--html", "pages/p.html")
    result = room.done(*compare)
    name = "x\ufffd[31m\ufffd|y"  # names of folders move no cursor
    warning, note = result.stderr.splitlines()
    assert warning == (
        "compare: warning: measured on 2 different held-out stores, so their figures do not "
        f"compare: a, {name} against c"
    )
    assert note == "compare: plots: pages/p.html; open it in a browser"
    names = models_of(result.stdout)
    assert names == ["a/teacher", "c/teacher", "c/small", f"{name}/small", "a/small", "a/alone"]
    page = (room.root / "pages" / "p.html").read_text(encoding="utf-8")
    assert " against c" in page
    assert room.done(*compare).stdout == result.stdout
    assert (room.root / "pages" / "p.html").read_text(encoding="utf-8") == page
    room.done("compare", "a", "--set", "seed=3", "--html", "p.html")
    beside = room.root / "runs" / "a" / "comparison.html"
    assert (room.root / "p.html").read_bytes() == beside.read_bytes()


def test_runs_that_cannot_be_compared_are_refused(room: Desk) -> None:
    write_run(room.root / "runs", "d", [])
    for arguments, line in (
        ("a runs/a", "error: runs/a: named twice; name every run once"),
        ("a b ./runs/../runs/a", "named twice, also as runs/a; name every run once"),
        ("a d", "error: runs/d: no student is evaluated yet; run coldstill evaluate"),
        ("a nowhere", "error: nowhere: no recipe file, no run folder and no built-in"),
        ("a b --html runs", "error: runs: a folder; name the file that the page is to"),
        ("a --html runs", "error: runs: a folder; name the file that the page is to be"),
    ):
        assert line in room.refused("compare", *arguments.split())
    for arguments, message in (
        ("", "Missing argument 'RUN...'"),
        ("a b --set seed=1", "--set changes one recipe; name a single RUN with it"),
    ):
        result = room.coldstill("compare", *arguments.split())
        assert result.exit_code == 2
        assert message in result.stderr


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
        (None, "does not exist;"),
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


@pytest.mark.slow
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
    return made_row(**{**known, **more})


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
    lines = tables([made_row("abcd"), made_row("\u65e5\u672c")]).split("\n\n")[0].splitlines()[2:]
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
    assert "stored: not known for teacher: only students that were trained from a store" in below
    assert below.count("the bytes of the held-out text, or the loss, are not known") == 1


def test_unknown_figures_are_dashes_with_a_reason_and_rounding_leaves_no_sign() -> None:
    lacking = made_row(
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
    quality, _, cost = markdown([made_row("x|y")]).split("\n\n")[:3]
    for table, columns in ((quality, QUALITY), (cost, COST)):
        lines = [line.replace("\\|", "") for line in table.splitlines()]
        assert [line.count("|") for line in lines] == [len(columns) + 2] * 3
        assert table.splitlines()[2].startswith("| x\\|y | ")
    assert "| ms/token (batch 1) |" in cost
    sizes = {
        0: "0 B", 999: "999 B", 1000: "1.0 kB", 1_234_567: "1.2 MB", 5e9: "5.0 GB",
        7.2e12: "7.2 TB", 7.2e15: "7200.0 TB",
    }  # fmt: skip
    assert {count: size(count) for count in sizes} == sizes


def test_other_held_out_stores_and_machines_are_warned_of() -> None:
    rows = [made_row(name, heldout=store) for name, store in (("a", "1"), ("b", "1"), ("c", "2"))]
    assert warnings(rows)[0].endswith("do not compare: a, b against c")
    assert (warnings(rows[:2]), notes(rows[:2])) == ([], [])
    assert warnings([made_row("older", heldout=None), *rows[:2]]) == []
    many = [made_row(f"m{i}", heldout=str(i > 0)) for i in range(12)]
    assert warnings(many)[0].endswith("m0 against m1, m2, m3, m4, m5, m6 and 5 more")
    rows[2] = made_row("c", machine="a phone", dtype="bf16", heldout="1")
    assert warnings(rows) == [
        "measured on 2 different machines, so speed and memory do not compare: a, b (2 CPU "
        "threads) against c (a phone)"
    ]
    precision = ["Weights are bf16 and fp32: precision changes speed and memory as size does."]
    assert notes(rows) == precision
    # without timing the machine does not matter
    assert warnings([*rows[:2], rows[2].model_copy(update={"generation": ()})]) == []


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
