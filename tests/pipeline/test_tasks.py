"""`evaluate --tasks`: tasks run once, their records, and refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.steps.tasks import TaskRecord, scores_table
from coldstill.stages.evaluation.lm_eval.results import Score, TaskResult
from printed import sentences
from small_tasks import PROSE, QUIZ, quiz, write_task

pytest.importorskip("lm_eval")

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk", "networkless")
pytestmark = pytest.mark.usefixtures("no_network")

TEXTS = [{"text": row["question"]} for row in quiz(3)]


def tasks_of(desk: Desk, student: str = "small") -> dict[str, Any]:
    return {r["task"]: r for r in desk.json("students", student, "tasks.json")}


@pytest.mark.slow
def test_all_trained_students_run_all_tasks_once(finished: Desk) -> None:
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

    before = finished.snapshot()
    again = finished.done("evaluate", "r.toml", "--tasks", "tasks")
    assert again.stdout == done.stdout
    assert sentences(again.stderr) == [
        f"evaluate {name}: already done: prose, quiz: runs/r/students/{name}/tasks.json"
        for name in ("baseline", "small")
    ]
    assert finished.snapshot() == before


def test_changed_questions_run_and_old_results_stay(finished: Desk) -> None:
    path = write_task(finished.root, "quiz", QUIZ, quiz())
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "quiz.yaml")
    finished.done(*ask)
    records = [finished.json("students", "small", "tasks.json")]
    for change in (["--limit", "4"], []):  # fewer examples, then others under the same name
        if not change:
            write_task(finished.root, "quiz", QUIZ, quiz(6, seed=1))
        assert sentences(finished.done(*ask, *change).stderr)[0].startswith(
            "evaluate small: done: quiz: "
        )
        records.append(finished.json("students", "small", "tasks.json"))
        assert records[-1][:-1] == records[-2]
    assert [r["results"][0]["examples"] for r in records[-1]] == [10, 4, 6]
    printed = json.loads(finished.done(*ask, "--json").stdout)
    assert printed == [{"name": "small", "tasks": [records[-1][-1]]}]

    # the same files in another folder are the same questions
    (finished.root / "moved").mkdir()
    for file in (path, path.with_suffix(".jsonl")):
        shutil.move(file, finished.root / "moved" / file.name)
    again = finished.done(*ask[:-1], "moved/quiz.yaml")
    assert sentences(again.stderr)[0].startswith("evaluate small: already done: quiz: ")


def test_a_retrained_student_and_a_named_local_teacher_run(finished: Desk) -> None:
    write_task(finished.root, "quiz", QUIZ, quiz(4))
    ask = ("evaluate", "r.toml", "--student", "teacher", "--tasks", "quiz.yaml")
    done = finished.done(*ask, "--student", "small")
    assert [row.split()[0] for row in done.stdout.splitlines()[2:]] == ["teacher", "small"]
    assert finished.json("teacher.tasks.json")[0]["results"][0]["examples"] == 4
    refused = finished.refused(*ask, "--set", "teacher.model=org/name")
    assert "--student teacher: org/name is a name on a hub" in refused

    old = tasks_of(finished)["quiz"]
    students = finished.run / "students"
    shutil.copytree(students / "baseline/model", students / "small/model", dirs_exist_ok=True)
    teacher, small = sentences(finished.done(*ask, "--student", "small").stderr)
    assert teacher.startswith("evaluate teacher: already done: quiz: ")
    assert small.startswith("evaluate small: done: quiz: ")
    (new,) = finished.json("students", "small", "tasks.json")
    assert new["model"] != old["model"]
    assert new["files"] == old["files"]


def test_a_group_runs_as_one_unit(finished: Desk) -> None:
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
    # a group without aggregation shows its tasks
    (folder / "all.yaml").write_text('{"group": "all", "task": ["both"]}', encoding="utf-8")
    titles = finished.done(*ask).stdout.splitlines()[0].split()
    assert titles == ["model", "a", "acc", "b", "acc"]


def test_fingerprints_cover_included_files_and_functions(finished: Desk) -> None:
    write_task(finished.root / "shared", "base", QUIZ, quiz(4))
    (finished.root / "shared/own.py").write_text(
        "def ask(doc):\n    return 'Q: ' + doc['question']\n", encoding="utf-8"
    )
    text = "task: mine\ninclude: ../shared/base.yaml\ndoc_to_text: !function own.ask\n"
    finished.write("mine/mine.yaml", text)
    ask = ("evaluate", "r.toml", "--student", "small", "--tasks", "mine")
    refused = finished.refused(*ask)  # a function must lie beside the file that names it
    assert "Cannot import module 'own'" in refused
    shutil.move(finished.root / "shared/own.py", finished.root / "mine/own.py")
    finished.done(*ask)
    files = tasks_of(finished)["mine"]["files"]
    assert set(files) == {"mine.yaml", "own.py", "../shared/base.yaml", "../shared/base.jsonl"}


BAD = {
    "not a readable task file: while parsing a flow sequence": "task: [a\nb: c",
    "not a readable task file: Expected YAML dict": "[a, b]",
    "not a readable task file: [Errno 2] No such file": "{task: q, include: no.yaml}",
    "not a readable task file: Include cycle": "{task: q, include: q.yaml}",
    "has no task: neither 'task' nor 'group'": "metric_list: []",
    "expected a name for its 'task', got ['a']": "task: [a]",
    "task 'q': has no data; set 'dataset_path'": "task: q",
    "task 'q': cannot read its 'data_files'": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: 5}}"
    ),
    "task 'q': reads 'json' files, but 'dataset_kwargs' has no 'data_files'": (
        "{task: q, dataset_path: json}"
    ),
    "task 'q': its data file no.jsonl is neither beside it nor in the current folder": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: no.jsonl}}"
    ),
    "task 'q': its data file q.yaml.empty is empty": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: {test: q.yaml.empty}}}"
    ),
    "task 'q': its data_dir gone is neither beside it": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_dir: gone}}"
    ),
    "task 'q': its dataset_path ./no is neither beside it": "{task: q, dataset_path: ./no}",
    "group 'g': 'hellaswag' is not in any of the given files": "{group: g, task: [hellaswag]}",
    "group 'g': groups contain each other": "{group: g, task: [g]}",
    "task 'q': expected a 'metric' in each of its 'metric_list'": (
        "{task: q, dataset_path: org/q, metric_list: [acc]}"
    ),
    "task 'q': no metric 'accc' in lm-eval; --download searches": (
        "{task: q, dataset_path: org/q, metric_list: [{metric: accc}]}"
    ),
    "task 'q' reads the data set 'org/q', which is not on this machine; --download fetches": (
        "{task: q, dataset_path: org/q}"
    ),
    "task 'q' reads the data set 'https://no.where/q.json', which is not on this machine": (
        "{task: q, dataset_path: json, dataset_kwargs: {data_files: 'https://no.where/q.json'}}"
    ),
}


def test_unusable_task_files_are_refused(finished: Desk) -> None:
    finished.write("q.yaml.empty", "")
    for expected, text in BAD.items():
        finished.write("q.yaml", text)
        error = finished.refused("evaluate", "r.toml", "--tasks", "q.yaml")
        assert error.startswith(f"error: q.yaml: {expected}")

    ask = ("evaluate", "r.toml", "--tasks")
    finished.write("empty/readme.txt", "")
    finished.write("empty/template.yaml", "test_split: test")
    assert "--tasks: empty: no task in it" in finished.refused(*ask, "empty")
    assert "--tasks: nowhere: no such file or folder" in finished.refused(*ask, "nowhere")
    for folder in ("a", "b"):
        finished.write(f"{folder}/q.yaml", "{task: q, dataset_path: org/q}")
    refused = finished.refused(*ask, "a", "--tasks", "b")
    assert refused.endswith("b/q.yaml: a second task 'q'; the first is in a/q.yaml")
    # the same file given twice is one task
    assert "data set 'org/q'" in finished.refused(*ask, "a", "--tasks", "a/q.yaml")
    assert "data set 'org/q'" in finished.refused(*ask, "a/q.yaml", "--tasks", "a")
    finished.write("a/g.yaml", "{group: g, task: [h]}")
    finished.write("a/h.yaml", "{group: h, task: [g]}")
    assert ": groups contain each other (" in finished.refused(*ask, "a")


def test_wrong_arguments_and_damaged_results_are_refused(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in (["--limit", "3"], ["--download"], ["--json"]):
        result = finished.coldstill("evaluate", "r.toml", *option)
        assert result.exit_code == 2
        assert f"{option[0]} needs --tasks PATH." in result.stderr
    write_task(finished.root, "quiz", QUIZ, quiz(1))
    ask = ("evaluate", "r.toml", "--tasks", "quiz.yaml")
    refused = finished.refused(*ask, "--student", "none")
    assert "student 'none' is not trained (trained: baseline, small)" in refused
    finished.write("runs/r/students/small/tasks.json", '[{"task": "quiz"}]')
    assert "students/small/tasks.json: damaged; delete it" in finished.refused(*ask)
    shutil.rmtree(finished.run / "students")
    assert "no student is trained yet" in finished.refused(*ask)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    missing = "error: evaluate: --tasks needs lm-eval: pip install 'coldstill[harness]'"
    assert finished.refused(*ask) == missing


def test_the_table_has_a_dash_for_a_missing_figure() -> None:
    def record(task: str, value: float | None) -> TaskRecord:
        result = TaskResult(task=task, main="acc", metrics={"acc": Score(value=value)}, examples=4)
        return TaskRecord(
            task=task, files={}, limit=None, model="m", lm_eval="0", results=(result,)
        )

    lines = scores_table(
        [("one", [record("a", 123456.7), record("b", None)]), ("two", [record("b", 0.5)])]
    )
    head, _, *rows = (line.split() for line in lines.splitlines())
    assert head == ["model", "a", "acc", "b", "acc"]
    assert rows == [["one", "123,456.70", "-"], ["two", "-", "0.5000"]]
