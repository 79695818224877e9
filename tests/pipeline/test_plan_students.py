"""What a plan tells of students with other tokens, with rounds, and of few bits."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.store.reader import open_store
from coldstill.stages.config import QuantizeConfig
from coldstill.stages.planning.rounding import RoundedSteps
from conftest import VOCABULARY, make_model
from other_tokens import PAIRS, add_students, model_of
from spellings import byte_pairs

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


def teacher_of(desk: Desk) -> Path:
    """The folder of the teacher."""
    found = re.search('model = "(.*)"', (desk.root / "r.toml").read_text(encoding="utf-8"))
    assert found is not None
    return Path(found[1])


def facts(desk: Desk) -> Any:
    """The plan as JSON."""
    return json.loads(desk.done("plan", "r.toml", "--json").stdout)


@pytest.mark.slow
def test_stores_in_a_students_tokens_are_estimated_then_sampled_then_counted(
    finished: Desk,
) -> None:
    model_of(finished.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    add_students(finished, *['like = "small"\nmodel = "./other"'] * 2)
    before = finished.snapshot()
    sampled = facts(finished)
    assert finished.snapshot() == before
    [own] = sampled["tokens"]
    assert own["students"] == ["a", "b"]
    assert own["hours"] > 0
    stored = finished.root / "stored"
    for name in ("logits", "heldout"):
        (finished.run / name).rename(stored.with_name(f"kept-{name}"))
    [estimated] = facts(finished)["tokens"]
    assert estimated["hours"] is None
    for name in ("logits", "heldout"):
        stored.with_name(f"kept-{name}").rename(finished.run / name)
    text = finished.done("plan", "r.toml").stdout
    assert "tokens       about " in text
    assert "(train, for a and b)" in text
    assert "note         tokens: " in text
    finished.done("train-student", "r.toml", "--student", "a")
    finished.done("evaluate", "r.toml", "--student", "a")
    [counted] = facts(finished)["tokens"]
    assert (
        counted["folder"]
        == own["folder"]
        == str(next((finished.run / "tokens").iterdir()).relative_to(finished.root) / "logits")
    )
    assert counted["hours"] == 0
    for split, name in (("train", "logits"), ("heldout", "heldout")):
        [folder] = (finished.run / "tokens").glob(f"*/{name}/")
        store = open_store(folder)
        one = counted["stores"][split]
        assert (one["positions"], one["bytes"]) == (store.positions, store.totals.bytes)
        assert one["counted"]
        assert one["bytes_missing"] == 0
        found = own["stores"][split]
        assert found["measured"] == "sample"
        assert found["positions"] == pytest.approx(store.positions, rel=0.1)
        assert found["bytes"] == pytest.approx(store.totals.bytes, rel=0.15)
        assert found["bytes_missing"] == found["bytes"]
        assert estimated["stores"][split]["positions"] == pytest.approx(store.positions, rel=0.2)
        assert estimated["stores"][split]["measured"] is None
    shutil.rmtree(finished.run / "tokens" / folder.parent.name / "heldout")
    [partly] = facts(finished)["tokens"]
    assert partly["hours"] > 0
    assert partly["stores"]["train"] == counted["stores"]["train"]


def test_a_student_that_reads_branches_needs_the_memory_of_longer_sequences(desk: Desk) -> None:
    model_of(desk.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    tables = ("", "objective.branches = 1", "objective.branches = 1\nretokenize.branches = 1")
    add_students(desk, *(f'like = "small"\nmodel = "./other"\n{table}' for table in tables))
    memory = facts(desk)["memory"]
    plain, some, many = (memory[f"train-student {name}"] for name in "abc")
    assert plain < some < many
    # four times as many further columns: attention grows with the square of the width
    assert many - plain > 4 * (some - plain) > 0


def test_tokens_that_cannot_be_aligned_are_refused_by_a_plan(desk: Desk) -> None:
    tokenizer: Any = byte_pairs(PAIRS, end="</s>")
    tokenizer.decoder = None
    model_of(desk.root / "other", tokenizer, "</s>")
    add_students(desk, 'like = "small"\nmodel = "./other"')
    line = desk.refused("plan", "r.toml")
    assert line.startswith("error: students.a: its tokenizer: the bytes of its tokens cannot be")


@pytest.mark.slow
def test_rounds_are_planned_from_what_was_measured(desk: Desk) -> None:
    table = "{ count = 2, prompts = 10, heldout = 5, prompt_tokens = 6, max_new_tokens = 8 }"
    desk.edit("[students.baseline]", f"rounds = {table}\n[students.baseline]")
    desk.edit('like = "small"', 'like = "small"\nrounds = 1')
    plan = facts(desk)
    texts = plan["rounds"]["small"]["texts"]
    assert [(one["round"], one["split"], one["positions"]) for one in texts] == [
        (1, "train", 80), (1, "heldout", 40), (2, "heldout", 40),
    ]  # fmt: skip
    width = plan["stores"]["train"]["bytes_per_position"]
    assert texts[0]["bytes"] == texts[0]["bytes_missing"] == round(80 * width)
    for stage in ("train-student small", "rounds write small", "rounds capture small"):
        assert plan["hours"][stage] is None
        assert plan["memory"][stage] > 0
    desk.done("teacher-logits", "r.toml")
    desk.done("train-student", "r.toml", "--student", "small")
    plan = facts(desk)
    # the second training is as long as the first one, whose speed is known
    assert plan["hours"]["train-student small"] > 0
    assert plan["hours"]["rounds write small"] is None
    assert plan["hours"]["rounds capture small"] > 0
    desk.done("rounds", "write", "r.toml")
    plan = facts(desk)
    writing = plan["hours"]["rounds write small"]
    speed = desk.json("students", "small", "written", "1", "writing.json")["tokens_per_second"]
    assert writing == pytest.approx(40 / speed / 3600)
    record = desk.json("students", "small", "written", "1", "text", "corpus.json")["splits"]
    first = plan["rounds"]["small"]["texts"][0]
    assert first["counted"]
    assert first["positions"] == record["train"]["positions"]
    desk.done("rounds", "capture", "r.toml")
    plan = facts(desk)
    first = plan["rounds"]["small"]["texts"][0]
    store = open_store(desk.run / "students" / "small" / "written" / "1" / "logits")
    assert (first["bytes"], first["bytes_missing"]) == (store.totals.bytes, 0)
    text = desk.done("plan", "r.toml").stdout
    assert "text         small, after training 1 (train): 10 answers of " in text
    assert "text         small, after training 2 (heldout): at most 5 answers of 40 tokens" in text
    assert ", own text, " in text
    desk.done("run", "r.toml")
    hours = facts(desk)["hours"]
    for stage in ("train-student small", "rounds write small", "rounds capture small"):
        assert hours[stage] == 0


def test_steps_that_round_take_longer(finished: Desk) -> None:
    steps = RoundedSteps.of(QuantizeConfig(scheme="int4", start=0.5), 10, 160)
    assert (steps.first, steps.slowdown) == (5, 1.5)
    assert steps.plain(0, 10) == 5 + 5 * 1.5
    assert steps.plain(4, 6) == 1 + 1.5
    assert steps.plain(7, 7) == 0
    assert RoundedSteps.of(None, 10, 160).plain(2, 9) == 7
    dynamic = RoundedSteps.of(QuantizeConfig(scheme="int4-dynamic"), 10, 160)
    assert dynamic.slowdown > steps.slowdown
    folder = finished.run / "students" / "small"
    (folder / "model").rename(folder / "away")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    plain = facts(finished)
    assert plain["students"]["small"]["slowdown"] is None
    finished.edit("train = {", 'quantize = { scheme = "int4", start = 0.6 }\ntrain = {')
    rounded = facts(finished)
    ratio = rounded["hours"]["train-student small"] / plain["hours"]["train-student small"]
    # one step is done without rounding, one is left without and one with it
    assert rounded["students"]["small"]["slowdown"] == 1 + round(80 / 256, 3)
    assert ratio == pytest.approx((1 + 1 + 80 / 256) / 2)
    assert "a step that rounds takes about 1.31 times" in finished.done("plan", "r.toml").stdout


def test_sizes_that_a_format_cannot_hold_are_refused_before_the_teacher_works(desk: Desk) -> None:
    desk.edit("hidden = 32, heads = 2 }", 'hidden = 48, heads = 2 }\nquantize = "int4"')
    message = "students.small.quantize: int4 has one scale for every 32 inputs of a layer, and"
    for command in ("plan", "run"):
        line = desk.refused(command, "r.toml")
        assert line.startswith(f"error: {message} its layers have 48; choose sizes of architecture")
    desk.edit('"int4"', '"int8-row"')
    assert "int8-row" not in desk.done("plan", "r.toml").stderr
    desk.edit("hidden = 48", "hidden = 64, feed_forward = 100")
    desk.edit('"int8-row"', '"int8"')
    assert "and its layers have 100" in desk.refused("plan", "r.toml")


def test_a_model_or_a_cut_that_a_format_cannot_hold_is_refused_before_the_teacher_works(
    desk: Desk,
) -> None:
    make_model("llama", VOCABULARY, hidden_size=48).save_pretrained(desk.root / "own")
    for path in teacher_of(desk).glob("tokenizer*"):
        shutil.copy(path, desk.root / "own")
    add_students(desk, 'like = "small"\nORIGIN\nquantize = "int4"')
    reason = "students.a.quantize: int4 has one scale for every 32 inputs of a layer, and its "
    for origin, message in (
        ('model = "./own"', "48; take a model with sizes that are multiples of 32, or"),
        (
            "prune = { feed_forward = 40 }",
            "40; choose sizes of prune that are multiples of 32, or",
        ),
    ):
        desk.edit("ORIGIN", origin)
        for command in ("plan", "run"):
            line = desk.refused(command, "r.toml")
            assert line.startswith(f"error: {reason}layers have {message}")
        desk.edit(origin, "ORIGIN")


@pytest.mark.parametrize(("key", "package"), [("quantize", "torchao"), ("lora", "peft")])
def test_a_missing_package_is_named_before_the_teacher_works(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    value = {"quantize": '"int4"', "lora": "{ rank = 2 }"}[key]
    add_students(desk, f'like = "small"\nlayers = [0]\n{key} = {value}')
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("coldstill.stages.students.lesson.find_spec", without)
    line = desk.refused("run", "r.toml")
    assert line.startswith(f"error: students.a.{key}: needs the package '{package}'")
