"""`evaluate --tasks`: what is run, what is kept, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.run_folder import StudentFolder
from coldstill.pipeline.steps.tasks.scores import add_record, table, task_scores
from said import sentences
from small_tasks import PROSE, QUIZ, quiz, write_task

pytest.importorskip("lm_eval")

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk", "networkless")
pytestmark = pytest.mark.usefixtures("no_network")

TEXTS = [{"text": row["question"]} for row in quiz(3)]


def tasks_of(desk: Desk, student: str = "small") -> dict[str, Any]:
    return {r["task"]: r for r in desk.json("students", student, "tasks.json")}


def test_every_trained_student_takes_every_task_and_keeps_its_results(finished: Desk) -> None:
    folder = finished.root / "tasks"
    write_task(folder, "quiz", QUIZ, quiz())
    write_task(folder / "deeper", "prose", PROSE, TEXTS)
    (folder / "template.yaml").write_text("dataset_path: json\n", encoding="utf-8")
    done = finished.done("evaluate", "r.toml", "--tasks", "tasks")
    assert sentences(done.stderr) == [
        f"evaluate {name}: done: prose, quiz: runs/r/students/{name}/tasks.json"
        for name in ("baseline", "small")
    ]
    head, _, *rows = done.stdout.splitlines()
    assert head.split("  ")[0] == "model"
    assert "prose bits_per_byte" in head
    assert "quiz acc" in head
    assert [row.split()[0] for row in rows] == ["baseline", "small"]
    for student, row in zip(("baseline", "small"), rows, strict=True):
        record = tasks_of(finished, student)["quiz"]
        assert record["files"] == {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("quiz.jsonl", "quiz.yaml")
        }
        assert record["lm_eval"].startswith("0.4")
        (result,) = record["results"]
        accuracy = result["metrics"]["acc"]
        assert result["examples"] == 10
        assert f"{accuracy['value']:.4f} ± {accuracy['stderr']:.4f}" in row
        assert not (finished.run / "teacher.tasks.json").exists()
    scores = task_scores(StudentFolder(finished.run / "students" / "small"))
    assert scores == {
        name: record["results"][0]["metrics"][record["results"][0]["main"]]["value"]
        for name, record in tasks_of(finished).items()
    }

    before = finished.snapshot()
    again = finished.done("evaluate", "r.toml", "--tasks", "tasks")
    assert again.stdout == done.stdout
    assert sentences(again.stderr) == [
        f"evaluate {name}: already done: prose, quiz: runs/r/students/{name}/tasks.json"
        for name in ("baseline", "small")
    ]
    assert finished.snapshot() == before


def test_other_questions_are_asked_and_what_was_known_stays(finished: Desk) -> None:
    path = write_task(finished.root, "quiz", QUIZ, quiz())
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "quiz.yaml")
    finished.done(*ask)
    records = [finished.json("students", "small", "tasks.json")]
    for change in (["--limit", "4"], []):  # fewer of them; then others, under the same name
        if not change:
            write_task(finished.root, "quiz", QUIZ, quiz(6, seed=1))
        assert sentences(finished.done(*ask, *change).stderr)[0].startswith(
            "evaluate small: done: quiz: "
        )
        records.append(finished.json("students", "small", "tasks.json"))
        assert records[-1][:-1] == records[-2]
    assert [r["results"][0]["examples"] for r in records[-1]] == [10, 4, 6]
    told = json.loads(finished.done(*ask, "--json").stdout)
    assert told == [{"name": "small", "tasks": [records[-1][-1]]}]
    best = records[-1][0]["results"][0]["metrics"]["acc"]["value"]
    assert task_scores(StudentFolder(finished.run / "students" / "small")) == {"quiz": best}

    # the same files elsewhere are the same questions
    (finished.root / "moved").mkdir()
    for file in (path, path.with_suffix(".jsonl")):
        shutil.move(file, finished.root / "moved" / file.name)
    again = finished.done(*ask[:-1], "moved/quiz.yaml")
    assert sentences(again.stderr)[0].startswith("evaluate small: already done: quiz: ")


def test_results_of_another_model_are_not_taken_for_this_ones(finished: Desk) -> None:
    write_task(finished.root, "quiz", QUIZ, quiz())
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "quiz.yaml")
    finished.done(*ask)
    old = tasks_of(finished)["quiz"]
    students = finished.run / "students"
    shutil.copytree(students / "baseline/model", students / "small/model", dirs_exist_ok=True)
    assert sentences(finished.done(*ask).stderr)[0].startswith("evaluate small: done: quiz: ")
    (new,) = finished.json("students", "small", "tasks.json")
    assert new["model"] != old["model"]
    assert new["files"] == old["files"]


def test_the_teacher_takes_tasks_if_it_is_named_and_here(finished: Desk) -> None:
    write_task(finished.root, "quiz", QUIZ, quiz(4))
    ask = ("evaluate", "r.toml", "--student", "teacher", "--tasks", "quiz.yaml")
    done = finished.done(*ask, "--student", "small")
    assert [row.split()[0] for row in done.stdout.splitlines()[2:]] == ["teacher", "small"]
    assert finished.json("teacher.tasks.json")[0]["results"][0]["examples"] == 4
    told = finished.refused(*ask, "--set", "teacher.model=org/name")
    assert "--student teacher: org/name is a name on a hub" in told


def test_a_group_is_one_task_with_all_its_parts(finished: Desk) -> None:
    folder = finished.root / "tasks"
    for name in ("a", "b"):
        write_task(folder, name, {**QUIZ, "tag": "both"}, quiz(4, seed=ord(name)))
    own = '{"group": "all", "task": ["both"], "aggregate_metric_list": [{"metric": "acc"}]}'
    (folder / "all.yaml").write_text(own, encoding="utf-8")
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "tasks")
    assert finished.done(*ask).stdout.splitlines()[0].split() == ["model", "all", "acc"]
    ((name, record),) = tasks_of(finished).items()
    group, *parts = record["results"]
    values = [part["metrics"]["acc"]["value"] for part in parts]
    assert (name, group["task"], [p["task"] for p in parts]) == ("all", "all", ["a", "b"])
    assert group["metrics"]["acc"]["value"] == pytest.approx(sum(values) / 2)
    assert set(record["files"]) == {"all.yaml", "a.yaml", "b.yaml", "a.jsonl", "b.jsonl"}
    # without a sum of its own its parts are told
    (folder / "all.yaml").write_text('{"group": "all", "task": ["both"]}', encoding="utf-8")
    titles = finished.done(*ask).stdout.splitlines()[0].split()
    assert titles == ["model", "a", "acc", "b", "acc"]


def test_included_files_and_functions_are_part_of_a_task(finished: Desk) -> None:
    write_task(finished.root / "shared", "base", QUIZ, quiz(4))
    (finished.root / "shared/own.py").write_text(
        "def ask(doc):\n    return 'Q: ' + doc['question']\n", encoding="utf-8"
    )
    text = "task: mine\ninclude: ../shared/base.yaml\ndoc_to_text: !function own.ask\n"
    finished.write("mine/mine.yaml", text)
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "mine")
    told = finished.refused(*ask)  # functions are looked for beside the file that names them
    assert "Cannot import module 'own'" in told
    shutil.move(finished.root / "shared/own.py", finished.root / "mine/own.py")
    finished.done(*ask)
    files = tasks_of(finished)["mine"]["files"]
    assert set(files) == {"mine.yaml", "own.py", "../shared/base.yaml", "../shared/base.jsonl"}


BAD = {
    "no YAML: line 2: ": "task: [a\nb: c",
    "holds no task: it has neither 'task' nor 'group'": "metric_list: []",
    "expected a name for its 'task', got ['a']": "task: [a]",
    "task 'q': names no data; give it 'dataset_path'": "task: q",
    "task 'q': reads 'json' files, but 'dataset_kwargs' names no data_files": (
        "{task: q, dataset_path: json}"
    ),
    "task 'q': its data file no.jsonl is neither beside it nor in the folder": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: no.jsonl}}"
    ),
    "task 'q': its data file q.yaml.empty is empty": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: {test: q.yaml.empty}}}"
    ),
    "task 'q': its data_dir gone is no folder": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_dir: gone}}"
    ),
    "task 'q': its dataset_path ./no is no folder": "{task: q, dataset_path: ./no}",
    "includes no.yaml, which is not there": "{task: q, include: no.yaml}",
    "includes q.yaml, which includes this file again": "{task: q, include: q.yaml}",
    "group 'g': holds 'hellaswag', which is in none of the files given": (
        "{group: g, task: [hellaswag]}"
    ),
    "group 'g': groups that hold one another": "{group: g, task: [g]}",
    "task 'q': expected a 'metric' in each of its 'metric_list'": (
        "{task: q, dataset_path: org/q, metric_list: [acc]}"
    ),
    "task 'q': no metric 'accc' in lm-eval; --download looks": (
        "{task: q, dataset_path: org/q, metric_list: [{metric: accc}]}"
    ),
    "task 'q' reads the data set 'org/q', which is not on this machine; with --download": (
        "{task: q, dataset_path: org/q}"
    ),
}


@pytest.mark.parametrize("told", list(BAD))
def test_a_task_file_that_cannot_be_used_is_refused_by_its_name(finished: Desk, told: str) -> None:
    finished.write("q.yaml", BAD[told])
    finished.write("q.yaml.empty", "")
    error = finished.refused("evaluate", "r.toml", "--tasks", "q.yaml")
    assert error.startswith(f"error: q.yaml: {told}")


def test_folders_without_tasks_and_two_tasks_of_one_name_are_refused(finished: Desk) -> None:
    finished.write("empty/readme.txt", "")
    finished.write("empty/template.yaml", "test_split: test")
    ask = ("evaluate", "r.toml", "--tasks")
    assert "--tasks: empty: no task in it" in finished.refused(*ask, "empty")
    assert "--tasks: nowhere: no such file or folder" in finished.refused(*ask, "nowhere")
    for folder in ("a", "b"):
        finished.write(f"{folder}/q.yaml", "{task: q, dataset_path: org/q}")
    told = finished.refused(*ask, "a", "--tasks", "b")
    assert told.endswith("b/q.yaml: a second task 'q'; the first is in a/q.yaml")
    finished.write("a/g.yaml", "{group: g, task: [h]}")
    finished.write("a/h.yaml", "{group: h, task: [g]}")
    assert "a/g.yaml: group 'g': groups that hold one another" in finished.refused(*ask, "a")
    for name in ("g", "h"):
        (finished.root / "a" / f"{name}.yaml").unlink()
    # the same file twice is no second task
    assert "data set 'org/q'" in finished.refused(*ask, "a", "--tasks", "a/q.yaml")
    assert "data set 'org/q'" in finished.refused(*ask, "a/q.yaml", "--tasks", "a")


def test_a_missing_lm_eval_is_told_with_its_command(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = finished.refused("evaluate", "r.toml", "--tasks", "q.yaml")
    assert told == "error: evaluate: --tasks needs lm-eval: pip install 'coldstill[harness]'"


def test_students_that_are_not_trained_are_refused(desk: Desk, finished: Desk) -> None:
    write_task(finished.root, "quiz", QUIZ, quiz(1))
    ask = ("evaluate", "r.toml", "--tasks", "quiz.yaml")
    told = finished.refused(*ask, "--student", "nobody")
    assert "student 'nobody' is not trained (trained: baseline, small)" in told
    shutil.rmtree(finished.run / "students")
    assert "no student is trained yet" in finished.refused(*ask)


def test_options_about_tasks_need_tasks(desk: Desk) -> None:
    for option in (["--limit", "3"], ["--download"], ["--json"]):
        result = desk.coldstill("evaluate", "r.toml", *option)
        assert result.exit_code == 2
        assert f"{option[0]} is about tasks; give them by --tasks PATH too" in result.stderr


def test_damaged_results_are_refused(finished: Desk) -> None:
    write_task(finished.root, "quiz", QUIZ, quiz(1))
    finished.write("runs/r/students/small/tasks.json", '[{"task": "quiz"}]')
    told = finished.refused("evaluate", "r.toml", "--tasks", "quiz.yaml")
    assert "students/small/tasks.json: damaged; delete it" in told
    with pytest.raises(ColdstillError, match="damaged"):
        task_scores(StudentFolder(finished.run / "students" / "small"))


def result(task: str, value: float | None, examples: int = 4) -> dict[str, Any]:
    score = {"value": value, "stderr": None, "higher_is_better": True}
    return {"task": task, "main": "acc", "metrics": {"acc": score}, "examples": examples}


def record(task: str, *results: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    asked: dict[str, Any] = {"task": task, "files": {}, "limit": limit}
    return {**asked, "model": "m", "lm_eval": "0", "results": list(results)}


def test_scores_are_of_the_most_examples_and_of_numbers(tmp_path: Path) -> None:
    folder = StudentFolder(tmp_path)
    assert task_scores(folder) == {}
    add_record(folder.tasks, record("a", result("a", 0.5, 9)))
    add_record(folder.tasks, record("a", result("a", 0.25, 3), limit=3))
    add_record(folder.tasks, record("b", result("b", None)))
    bare: dict[str, Any] = {"task": "g", "main": None, "metrics": {}, "examples": 0}
    add_record(folder.tasks, record("g", bare, result("c", 0.75)))
    add_record(folder.tasks, record("a", result("a", 0.0, 9)))  # there already
    assert task_scores(folder) == {"a": 0.5, "c": 0.75}


def test_a_cell_without_a_figure_is_a_dash() -> None:
    rows = [
        ("one", [record("a", result("a", 123456.7)), record("b", result("b", None))]),
        ("two", [record("b", result("b", 0.5))]),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split() == ["model", "a", "acc", "b", "acc"]
    assert [line.split() for line in lines[2:]] == [
        ["one", "123,456.70", "-"],
        ["two", "-", "0.5000"],
    ]
