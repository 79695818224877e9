"""`plan --pilot` measures a sample, recommends a capture, and writes it into the recipe."""

from __future__ import annotations

import json
import shutil
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.schema import Capture
from coldstill.pipeline.planning.pilot_record import PilotRecord, PilotRow
from coldstill.pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

PILOT = ("plan", "r.toml", "--pilot", "6")


@pytest.fixture(scope="module")
def first_pilot(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, teacher_folder: Path
) -> tuple[Desk, str]:
    from desk import RECIPE, Desk

    desk = Desk(tmp_path_factory.mktemp("piloted"))
    desk.write("r.toml", RECIPE.format(texts=texts, teacher=f'model = "{teacher_folder}"'))
    return desk, desk.done(*PILOT).stdout


@pytest.fixture
def piloted(first_pilot: tuple[Desk, str], tmp_path: Path) -> Desk:
    """A copy of the desk after the pilot of six sequences."""
    from desk import Desk

    shutil.copytree(first_pilot[0].root, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path)


def rows(measured: Any) -> dict[tuple[int, int, str], Any]:
    return {(row["head"], row["tail"], row["codec"]): row for row in measured["captures"]}


@pytest.mark.slow
def test_a_pilot_measures_captures_and_recommends_one(first_pilot: tuple[Desk, str]) -> None:
    desk, output = first_pilot
    measured = desk.json("pilot.json")
    found = rows(measured)
    pairs = [(4, 4), (0, 12), (0, 24), (8, 8), (16, 16), (4, 20), (50, 0), (64, 0)]
    pairs.append((Capture().head, Capture().tail))
    assert set(found) == {*((*pair, "compact") for pair in pairs), (4, 4, "plain")}
    assert measured["sequences"] == 6
    assert 0 < measured["covered_mass"]["1"] < measured["covered_mass"]["128"] <= 1
    assert all(0 <= row["angle"] <= 180 and row["gradient_error"] > 0 for row in found.values())
    assert found[0, 24, "compact"]["gradient_error"] < found[0, 12, "compact"]["gradient_error"]
    assert not (desk.run / "logits").exists()
    assert not (desk.run / "heldout").exists()
    assert [p.name for p in desk.run.iterdir() if p.name.startswith(".")] == []
    lines = output.splitlines()
    assert lines[0].startswith(f"pilot        6 sequences, {measured['positions']:,} positions, ")
    heading = next(
        i for i, line in enumerate(lines) if line.split()[:3] == ["head", "tail", "codec"]
    )
    table = [line.split() for line in lines[heading + 1 : heading + 1 + len(found)]]
    assert [(int(r[0]), int(r[1]), r[2]) for r in table] == list(found)
    assert [line for line in lines if line.endswith("this recipe")] == [lines[heading + 1]]
    own = found[4, 4, "compact"]["bytes_per_position"]
    fitting = [
        (row["gradient_error"], row["bytes_per_position"], key)
        for key, row in found.items()
        if key[2] == "compact" and row["bytes_per_position"] <= own
    ]
    head, tail, _ = min(fitting)[2]
    assert lines[-1] == f"head = {head}, tail = {tail}"


def pilot_row(head: int, codec: str, width: float, error: float) -> PilotRow:
    return PilotRow(
        head=head, tail=4, codec=codec, bytes_per_position=width, gradient_error=error, kl=0.0,
        angle=0.0, norm_ratio=1.0, relative_error=0.0,
    )  # fmt: skip


def test_the_best_capture_within_the_budget_is_recommended(first_pilot: tuple[Desk, str]) -> None:
    recipe = load_recipe(str(first_pilot[0].root / "r.toml")).recipe
    pilot = PilotRecord(
        settings={}, sequences=1, positions=1, tokens_per_second=1.0, machine="", covered_mass={},
        captures=[
            pilot_row(4, "compact", 20.0, 0.3),
            pilot_row(4, "plain", 10.0, 0.0),  # a recommendation keeps the codec
            pilot_row(5, "compact", 30.0, 0.1),
            pilot_row(6, "compact", 19.0, 0.2),
            pilot_row(7, "compact", 18.0, 0.2),
        ],
    )  # fmt: skip
    for budget, head in ((None, 7), (20.0, 7), (18.5, 7), (30.0, 5), (99.0, 5), (17.9, None)):
        choice = pilot.recommended(recipe, budget)
        assert (None if choice is None else choice.head) == head


def test_a_later_plan_uses_the_pilot_s_figures(piloted: Desk) -> None:
    measured = piloted.json("pilot.json")
    plan = json.loads(piloted.done("plan", "r.toml", "--json").stdout)
    found = rows(measured)
    train = plan["stores"]["train"]
    assert train["measured"] == "pilot"
    assert train["bytes_per_position"] == round(found[4, 4, "compact"]["bytes_per_position"], 1)
    for way in plan["alternatives"]:
        key = (way["head"], way["tail"], way["codec"])
        assert way["bytes_per_position"] == round(found[key]["bytes_per_position"], 1)
    speed = measured["tokens_per_second"]
    sequences = sum(store["sequences"] for store in plan["stores"].values())
    assert plan["tokens_per_second"] == speed
    assert plan["hours"]["teacher-logits"] == pytest.approx(sequences * 32 / speed / 3600)
    other = json.loads(
        piloted.done("plan", "r.toml", "--json", "--set", "teacher.dtype=bf16").stdout
    )
    assert other["stores"]["train"]["measured"] is None
    assert other["hours"]["teacher-logits"] is None


@pytest.mark.slow
def test_a_capture_is_about_as_large_as_the_pilot_estimated(piloted: Desk) -> None:
    expected = rows(piloted.json("pilot.json"))[4, 4, "plain"]["bytes_per_position"]
    piloted.done("teacher-logits", "r.toml", "--set", "logits.codec=plain")
    commits = [json.loads(p.read_text()) for p in (piloted.run / "logits/shards").glob("*.json")]
    stored = sum(f["bytes"] for commit in commits for f in commit["files"])
    # the file frame is a larger part of six sequences
    assert stored / sum(c["positions"] for c in commits) == pytest.approx(expected, rel=0.4)


def test_write_changes_two_numbers_of_the_recipe(piloted: Desk) -> None:
    path = piloted.root / "r.toml"
    before = path.read_text(encoding="utf-8")
    result = piloted.done(*PILOT, "--budget", "150", "--write")
    line = result.stdout.splitlines()[-1]
    head, tail = (int(part.split(" = ")[1]) for part in line.split(", "))
    text = path.read_text(encoding="utf-8")
    assert text == before.replace("head = 4\ntail = 4\n", f"head = {head}\ntail = {tail}\n")
    assert tomllib.loads(text)["logits"]["tail"] == tail
    assert f"plan: r.toml: {line}" in result.stderr
    assert (head, tail) != (4, 4)


def test_wrong_options_of_a_pilot_are_refused(piloted: Desk) -> None:
    before = piloted.snapshot()
    for arguments in (
        "--pilot 0", "--pilot -3", "--pilot many", "--budget 30", "--write", "--pilot 4 --budget 0",
        "--pilot 4 --budget nan",
    ):  # fmt: skip
        result = piloted.coldstill("plan", "r.toml", *arguments.split())
        assert result.exit_code == 2
        assert "Error: " in result.stderr
    count = piloted.json("corpus", "corpus.json")["splits"]["train"]["sequences"]
    line = piloted.refused("plan", "r.toml", "--pilot", str(count + 1))
    assert f"--pilot {count + 1}: there are {count} sequences to capture; choose " in line
    line = piloted.refused("plan", "r.toml", "--pilot", "4", "--set", "logits.sequences=3")
    assert "there are 3 " in line
    line = piloted.refused(*PILOT, "--set", "logits.head=400")
    assert line.startswith("error: logits.head: 400 is more than the vocabulary's 320 tokens")
    assert piloted.snapshot() == before
    result = piloted.coldstill(*PILOT, "--budget", "0.5", "--write")
    assert result.exit_code == 1
    assert "no measured capture fits into 0.5 bytes per position" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: --write: no measured capture fits")
    assert piloted.snapshot()["r.toml"] == before["r.toml"]
    (piloted.run / "pilot.json").write_text("{}", encoding="utf-8")
    line = piloted.refused("plan", "r.toml")
    assert line == "error: runs/r/pilot.json: damaged; delete it and run coldstill plan --pilot"


def test_an_untrained_teacher_and_one_split_across_processes_are_refused(desk: Desk) -> None:
    line = desk.refused("plan", "demo", "--pilot", "4")
    assert "the teacher is not trained yet" in line
    assert "train it first with coldstill train-teacher demo" in line
    line = desk.refused(*PILOT, "--set", "teacher.tensor_parallel=true")
    assert "a pilot is one process; run it with --set teacher.tensor_parallel=false" in line


@pytest.mark.slow
def test_recipes_that_cannot_be_changed_are_refused(finished: Desk) -> None:
    write = ("--pilot", "4", "--write")
    assert "--write: demo is built in or a run's own" in finished.refused("plan", "demo", *write)
    assert "--write: runs/r is built in or " in finished.refused("plan", "runs/r", *write)
    own = finished.refused("plan", "runs/r/recipe.toml", "--runs", "elsewhere", *write)
    assert "a run's own record" in own
    line = finished.refused("plan", "r.toml", *write)
    assert line.startswith("error: --write: runs/r/logits already exists")


def test_a_teacher_that_answers_prompts_is_measured_on_its_answers(desk: Desk) -> None:
    prompts = [json.dumps({"prompt": f"the teacher speaks {i} and every"}) for i in range(40)]
    desk.write("prompts.jsonl", "\n".join(prompts))
    settings = ['corpus.files=["prompts.jsonl"]', "teacher.generate={ max_new_tokens = 8 }"]
    words = [word for setting in settings for word in ("--set", setting)]
    desk.done(*PILOT, *words)
    measured = desk.json("pilot.json")
    assert 0 < measured["positions"] <= 6 * 8
    plan = json.loads(desk.done("plan", "r.toml", "--json", *words).stdout)
    train = plan["stores"]["train"]
    # only the teacher decides the length of answers, so the limit is planned
    assert train["positions"] == 8 * train["sequences"]
    assert not train["counted"]
