"""The table of all models of a run, or of several."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.reader import open_store
from coldstill.pipeline.comparison.caveats import notes, warnings
from coldstill.pipeline.comparison.command import compare
from coldstill.pipeline.comparison.table import markdown, tables
from coldstill.pipeline.run import Run
from coldstill.pipeline.units import size
from compared import FORMATS, Made, models_of, write_run
from compared import figures as measured_figures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

CACHED = "cached_bytes_per_position"
QUALITY = {
    "name": "a-long-name",
    "parameters": 1234567,
    "cached_bytes_per_position": 42.34,
    "loss": 1.23456,
    "perplexity": 3.4567,
    "bits_per_byte": 1.5,
    "kl": 0.01,
    "agreement": 0.5,
    "acceptance": 0.75,
    "ece": 0.01234,
}
SPEED = {
    "batch": 1,
    "prefill_tokens_per_second": 12345.6,
    "first_token_seconds": 0.0456,
    "token_seconds": 0.00123,
    "token_seconds_p95": 0.00234,
    "memory_bytes": None,
    "decode_tokens_per_second": 813.0,
}
ROW = {
    **QUALITY, "dtype": "bf16", "bytes": 2_500_000, "flops_per_token": 2_469_134,
    "generation": [SPEED],
}  # fmt: skip


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
    quality, title, cost = text.split("\n\n")
    assert title == f"What it costs to run ({json.loads(printed)[0]['machine']}):"
    for table in (quality, cost):
        lines = table.splitlines()
        assert len(lines) == 2 + 3
        assert len({line.count("|") for line in lines}) == 1
        assert lines[2].startswith("| teacher | ")


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


def test_columns_line_up_with_numbers_to_the_right() -> None:
    quality, cost = tables([{**ROW, "name": "t"}, {**ROW, "parameters": 1}]).split("\n\n")
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
    assert " ".join(below.split()) == (
        "An export's quality is its student's, plus the difference between both on 8,192 held-out "
        "positions. Run by torch 2.13.0 (models, hf, torchao-int8), onnxruntime 1.23.2 (onnx, "
        "onnx-int8), llama.cpp 0.3.36 (gguf-f16, gguf-q8_0)."
    )
    lines = markdown(rows).splitlines()
    assert "| small (onnx-int8) | 926,336 " in "\n".join(lines)
    assert lines[-3:][0].startswith("An export's quality")


def test_markdown_has_a_cell_for_each_figure() -> None:
    quality, _, cost = markdown([ROW]).split("\n\n")
    assert [line.count("|") for line in quality.splitlines()] == [len(QUALITY) + 1] * 3
    assert [line.count("|") for line in cost.splitlines()] == [12 + 1] * 3
    assert "| ms/token (batch 1) |" in cost


def test_what_is_not_known_is_a_dash_and_nothing_measured_is_none() -> None:
    lacking = {"name": "x", "parameters": 1, "bytes": 0, "generation": [{**SPEED, "batch": 8}]}
    cost = tables([lacking]).split("\n\n")[1].splitlines()[-1]
    assert cost.split() == ["x", *"--------", "1.23", "2.34", "813"]


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


def test_students_of_one_run_may_be_measured_on_different_stores() -> None:
    rows = [{"name": name, "heldout": store} for name, store in (("a", 1), ("b", 1), ("c", 2))]
    assert warnings(rows)[0].endswith("do not compare: a, b against c")
    assert warnings(rows[:2]) == []
    assert warnings([{"name": "of an older version"}, *rows[:2]]) == []
    many = [{"name": f"m{i}", "heldout": i > 0} for i in range(12)]
    assert warnings(many)[0].endswith("m0 against m1, m2, m3, m4, m5, m6 and 5 more")


def test_speed_of_other_machines_is_warned_of_and_of_other_precision_told() -> None:
    rows = [measured_figures(name, 5.0, 1000) for name in "abc"]
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


def test_wide_letters_take_two_columns_of_a_terminal() -> None:
    plain, wide = {**ROW, "name": "abcd"}, {**ROW, "name": "\u65e5\u672c"}
    lines = tables([plain, wide]).split("\n\n")[0].splitlines()[2:]
    assert lines[0].removeprefix("abcd") == lines[1].removeprefix("\u65e5\u672c")


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
