"""The command line with a teacher that a server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from coldstill.data.places.faults import Patience
from coldstill.stages.models.engines import http_client
from served import Served, serving

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

TABLES = """\
engine = "server"
url = "{url}"
[logits]
head = 4
tail = 0
shard_tokens = 640
[evaluation]
head = 16
tail = 0
sequences = 12
"""


def _with_server(desk: Desk, teacher_folder: Path, url: str) -> None:
    """A recipe with a teacher on a server; its folder has no weights."""
    bare = desk.root / "bare"
    bare.mkdir()
    for path in teacher_folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            (bare / path.name).write_bytes(path.read_bytes())
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    start = text.index("model = ")
    students = text[text.index("[students.small]") :]
    tables = 'model = "bare"\n' + TABLES.format(url=url)
    desk.write("r.toml", text[:start] + tables + students)


@pytest.fixture
def served(desk: Desk, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(http_client, "PATIENCE", Patience(tries=2, delay=0.01, longest=0.02))
    return Served(teacher_folder)


def test_a_run_without_weights(desk: Desk, teacher_folder: Path, served: Served) -> None:
    with serving(served):
        _with_server(desk, teacher_folder, served.url)
        planned = desk.done("plan", "r.toml").stdout
        assert "memory       teacher-logits" not in planned
        desk.done("teacher-logits", "r.toml")
    # complete stores need no server
    for command in ("teacher-logits", "train-student", "evaluate", "plan", "report"):
        result = desk.done(command, "r.toml")
        if command == "evaluate":
            assert "kl and acceptance are lower bounds" in result.stderr
            assert "the teacher's entropy is an upper bound" in result.stderr
    manifest = desk.json("logits", "manifest.json")
    assert manifest["teacher"]["engine"]["options"] == {"model": "served"}
    inspected = desk.done("inspect", "runs/r/logits").stdout
    assert "run by server vllm 1.2.3" in " ".join(inspected.split())


def test_what_a_server_cannot_give_is_refused(desk: Desk, teacher_folder: Path) -> None:
    _with_server(desk, teacher_folder, "http://127.0.0.1:9/v1")
    for setting, text in {
        "logits.tail=4": "logits: a server lists the most probable tokens and gives no samples",
        "evaluation.tail=4": "evaluation: a server lists",
        "logits.temperatures=[2.0]": "logits.temperatures: a server gives probabilities",
        'teacher.url="ftp://x"': "url: expected an address",
        'teacher.url="http://joe:key@host/v1"': "it has a user or a query",
        'teacher.url="http://host:80a/v1"': "http://HOST:PORT/v1",
        'teacher.dtype="bf16"': "has both 'url' and 'dtype'",
        'teacher.engine="vllm"': "has 'url' without engine",
        "teacher.train={ steps = 2 }": "a server's model cannot be trained",
        'teacher.engine_options={ modle = "x" }': "a server's are model, requests, timeout",
    }.items():
        assert text in desk.refused("teacher-logits", "r.toml", "--set", setting)
    line = desk.refused("plan", "r.toml", "--pilot", "4")
    assert "whole distributions, which a server does not send" in line


def test_a_server_that_is_away_is_one_line(
    desk: Desk, teacher_folder: Path, served: Served
) -> None:
    _with_server(desk, teacher_folder, "http://127.0.0.1:9/v1")
    line = desk.refused("teacher-logits", "r.toml")
    assert "http://127.0.0.1:9/v1/models: still failing after 2 tries" in line


def test_samples_are_needed_without_a_server(desk: Desk) -> None:
    line = desk.refused("teacher-logits", "r.toml", "--set", "evaluation.tail=0")
    assert line.startswith("error: r.toml: evaluation.tail: samples make KL and acceptance exact")
