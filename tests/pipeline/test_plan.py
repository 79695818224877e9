"""What a recipe will do and cost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.pipeline.planning.costs import pruning_hours
from coldstill.pipeline.planning.sizes import (
    existing,
    expect_room,
    expect_writable,
    expected_bytes,
    store_sizes,
)
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import open_run
from coldstill.pipeline.recipe.work import Work
from coldstill.stages.planning.model_sizes import ModelSizes
from coldstill.stages.report import silent
from coldstill.stages.students.pruning.config import PruneConfig

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)
ANSWER = {"role": "assistant", "content": "!"}


def facts(desk: Desk, *arguments: str) -> Any:
    """The plan as JSON."""
    return json.loads(desk.done("plan", "r.toml", "--json", *arguments).stdout)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make every disk report so many free bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": count})())


def work_of(desk: Desk) -> Work:
    loaded = load_recipe(str(desk.root / "r.toml"))
    return Work(loaded, open_run(desk.root / "runs", "r", loaded), silent)


def test_a_plan_before_any_step_estimates_and_writes_nothing(desk: Desk, texts: Path) -> None:
    before = desk.snapshot()
    plan = facts(desk)
    lines = desk.done("plan", "r.toml").stdout.splitlines()
    assert desk.snapshot() == before
    assert not (desk.root / "runs").exists()
    assert plan["source_bytes"] == sum(path.stat().st_size for path in texts.iterdir())
    assert plan["sources"] == 60
    assert plan["counted"] is False
    assert plan["basis"] == "estimated from all 60 documents"
    # 320 tokens, or 336 with the teacher's padding rows, which are not known yet
    embeddings, layer = 336 * 32, 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    assert plan["students"] == {
        name: {
            "steps": 3, "tokens": 768, "parameters": embeddings + layer + 32, "done": False,
            "note": None, "not_exported_to": [], "slowdown": None,
        }
        for name in ("small", "baseline")
    }  # fmt: skip
    assert plan["free_bytes"] > 0
    assert "folder" not in plan["stores"]["train"]
    first_words = [line.split()[0] for line in lines if not line.startswith(" ")]
    stages = ["corpus", "note", "teacher", "train", "heldout", "student", "student"]
    assert first_words == [*stages, "memory", "memory", "memory", "kept", "disk"]
    assert lines[1] == "note         corpus: estimated from all 60 documents"
    assert lines[3].endswith("to do")
    assert "about" in lines[3]
    assert 0.8 < plan["supervised_share"]["train"] < 1
    assert plan["hours"] == dict.fromkeys(plan["memory"])  # no speed was measured yet


def test_a_plan_without_a_tokenizer_assumes_4_bytes_per_token(desk: Desk, texts: Path) -> None:
    words = ["--set", "teacher.model=ORG/NAME"]
    plan = facts(desk, *words)
    size = sum(path.stat().st_size for path in texts.iterdir())
    assert sum(plan["positions"].values()) == pytest.approx(size / 4, rel=0.05)
    assert plan["memory"] == dict.fromkeys(plan["memory"])
    text = desk.done("plan", "r.toml", *words).stdout
    assert text.splitlines()[1] == (
        "note         corpus: estimated with 4 bytes per token: the tokenizer of ORG/NAME is not "
        "on this machine"
    )
    assert "memory       teacher-logits: unknown, its model is not on this machine" in text
    text = desk.done("plan", "demo").stdout
    assert "tokenizer is not trained yet" in text
    assert "teacher      trained here, not yet" in text
    assert "students" not in text


@pytest.mark.slow
def test_a_finished_run_is_counted_and_equals_its_estimate(finished: Desk) -> None:
    plan = facts(finished)
    assert plan["counted"] is True
    assert all(student["done"] for student in plan["students"].values())
    for split, folder in (("train", "logits"), ("heldout", "heldout")):
        store, planned = open_store(finished.run / folder), plan["stores"][split]
        assert (planned["shards_done"], planned["shards"]) == (store.manifest.shards,) * 2
        stored = sum(commit.bytes for commit in store.commits())
        assert planned["positions"] == store.positions
        missing = (planned["bytes"], planned["bytes_missing"], planned["shards_missing"])
        assert missing == (stored, 0, 0)
        assert planned["measured"] == "store"
        assert planned["bytes_per_position"] == round(stored / store.positions, 1)
    record = finished.json("corpus", "corpus.json")["splits"]["train"]
    share = round(record["positions"] / record["tokens"], 4)
    assert plan["supervised_share"]["train"] == share
    text = finished.done("plan", "r.toml").stdout
    assert "to do" not in text
    assert "about" not in "".join(text.splitlines()[:6])
    assert text.splitlines()[-1].startswith("disk         nothing more to write, ")
    width = plan["stores"]["train"]["bytes_per_position"]
    for folder in ("corpus", "logits", "heldout"):
        shutil.rmtree(finished.run / folder)
    estimated = facts(finished)
    assert estimated["counted"] is False
    for key in ("sequences", "positions", "supervised_share"):
        assert estimated[key] == plan[key]
    # the file format is a large part of a store of a few hundred positions
    assert estimated["stores"]["train"]["bytes_per_position"] < width
    assert width < 20 * estimated["stores"]["train"]["bytes_per_position"]


@pytest.mark.slow
def test_an_interrupted_capture_is_planned_from_its_finished_shards(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = facts(finished)
    commit = finished.json("logits", "shards", "00001.json")
    (finished.run / "logits" / "shards" / "00001.json").unlink()
    plan = facts(finished)
    train = plan["stores"]["train"]
    assert train["shards_done"] == train["shards"] - 1
    assert train["shards_missing"] == 1
    assert train["positions"] == whole["stores"]["train"]["positions"]
    # finished shards are counted, the missing one is estimated from their width
    bytes_here = whole["stores"]["train"]["bytes"] - sum(f["bytes"] for f in commit["files"])
    assert train["bytes"] - train["bytes_missing"] == bytes_here
    width = bytes_here / (train["positions"] - commit["positions"])
    assert train["bytes_missing"] == pytest.approx(width * commit["positions"], abs=1)
    speed = finished.json("logits", "measurements.json")["capture_tokens_per_second"]
    assert plan["tokens_per_second"] == speed
    hours = commit["sequences"] * 32 / speed / 3600
    assert plan["hours"]["teacher-logits"] == pytest.approx(hours)
    assert whole["hours"]["teacher-logits"] == 0
    text = finished.done("plan", "r.toml").stdout
    assert f"{train['shards_done']} of {train['shards']} shards, 1 missing" in text
    assert f" to go at {speed:,.0f} tokens/s" in text
    work = work_of(finished)
    free(monkeypatch, train["bytes_missing"])
    expect_room(store_sizes(work).values())
    free(monkeypatch, 0)
    with pytest.raises(ColdstillError, match=r"runs/r/logits: .* and 0 B are free; free some"):
        expect_room(store_sizes(work).values())


@pytest.mark.slow
def test_the_time_of_a_student_follows_from_its_last_steps(finished: Desk) -> None:
    whole = facts(finished)
    some = facts(finished, "--set", "logits.path=other/logits",
                 "--set", "logits.sequences=10")["stores"]["train"]  # fmt: skip
    scaled = whole["stores"]["train"]["positions"] * 10 / whole["sequences"]["train"]
    assert some["positions"] == pytest.approx(scaled, abs=1)
    assert (some["sequences"], some["counted"]) == (10, False)
    folder = finished.run / "students" / "small"
    shutil.rmtree(folder / "model")
    lines = [{"step": step, "tokens_per_second": 2560.0} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    hours = facts(finished)["hours"]
    assert hours["train-student baseline"] == 0
    assert hours["train-student small"] == pytest.approx(256 / 2560 / 3600)  # one step of three
    (folder / "metrics.jsonl").unlink()
    assert facts(finished)["hours"]["train-student small"] is None


def test_a_capture_is_compared_with_four_others(desk: Desk) -> None:
    for settings in ([], ["logits.head=16", "logits.tail=16"], ["logits.codec=plain"]):
        plan = facts(desk, *[word for s in settings for word in ("--set", s)])
        own = (plan["capture"]["head"], plan["capture"]["tail"], plan["codec"])
        others = [(way["head"], way["tail"], way["codec"]) for way in plan["alternatives"]]
        assert len({*others, own}) == 5
        assert (*own[:2], "compact" if own[2] == "plain" else "plain") in others
        positions = plan["stores"]["train"]["positions"]
        for way in plan["alternatives"]:
            width = expected_bytes(Capture(head=way["head"], tail=way["tail"]), way["codec"])
            assert (way["bytes_per_position"], way["bytes"]) == (width, positions * width)
    few = 16**0.67  # different tokens of 16 draws from the whole distribution
    for capture, targets in (
        (Capture(head=16, tail=0), 16 * 8 + 12),
        (Capture(head=0, tail=16), round(few * 8 + 4 + 12)),
        (Capture(head=16, tail=16, tail_logprobs=True), 16 * 8 + 16 * 12 + 4 + 12),
        (Capture(head=16, tail=16, temperatures=(2.0,)), 16 * 8 + 16 * 12 + 4 + 12 + 4),
    ):
        assert expected_bytes(capture, "plain") == targets + 8  # token, position and borders


def test_a_plan_warns_of_models_and_refuses_a_corpus_that_cannot_be_prepared(desk: Desk) -> None:
    memory = facts(desk)["memory"]
    larger = facts(desk, "--set", "students.small.architecture.hidden=64")["memory"]
    assert larger["train-student small"] > memory["train-student small"]
    assert larger["teacher-logits"] == memory["teacher-logits"]
    rounded = facts(desk, "--set", "students.small.quantize=int8")
    more = rounded["memory"]["train-student small"] - memory["train-student small"]
    assert more == 4 * rounded["students"]["small"]["parameters"]
    sizes = "layers = 1, hidden = 32, heads = 2, feed_forward = 64"
    desk.edit(
        "[students.baseline]",
        f'[students.own]\narchitecture = {{ family = "falcon", {sizes} }}\n'
        "train = { steps = 1, batch_tokens = 256 }\n[students.baseline]",
    )
    assert facts(desk)["students"]["own"]["not_exported_to"] == [
        "gguf-f16", "gguf-q8_0", "gguf-q4_0",
    ]  # fmt: skip
    text = desk.done("plan", "r.toml").stdout
    assert text.count("cannot be exported") == 1
    note = "students.own: a student of this family cannot be exported to gguf-f16, gguf-q8_0, gguf"
    assert f"{note}-q4_0" in text
    desk.write("damaged.jsonl.zst", b"no such thing" * 99)
    chat = json.dumps({"messages": [{"role": "user", "content": "?"}, ANSWER]}) + "\n"
    desk.write("chats.jsonl", chat * 9)
    for name, reason in (
        ("damaged.jsonl.zst", "cannot be read: it is not compressed with zstd but of another kind"),
        ("chats.jsonl", "a chat, but the tokenizer has no chat template"),
    ):
        line = desk.refused("plan", "r.toml", "--set", f'corpus.files=["{name}"]')
        assert line.startswith(f"error: {name}: {reason}")


def test_a_disk_that_is_too_small_ends_a_plan_with_exit_code_1(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(store["bytes_missing"] for store in facts(desk)["stores"].values())
    assert needed > 1000
    before = desk.snapshot()
    free(monkeypatch, needed - 1)
    result = desk.coldstill("plan", "r.toml", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["free_bytes"] == needed - 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: runs/r/logits and runs/r/heldout: about ")
    assert "logits.path" in line
    text = desk.coldstill("plan", "r.toml").stdout
    assert text.splitlines()[-1].endswith(" free: not enough")
    free(monkeypatch, needed)
    desk.done("plan", "r.toml")
    assert desk.snapshot() == before
    # a remote store needs no local space
    desk.edit("[logits]\n", '[logits]\npath = "memory://room/logits"\n')
    desk.edit("[evaluation]\n", '[evaluation]\npath = "memory://room/heldout"\n')
    free(monkeypatch, 0)
    expect_room(store_sizes(work_of(desk)).values())


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.write("taken", "a file")
    result = desk.coldstill("plan", "r.toml", "--set", "logits.path=taken/logits")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"{desk.root / 'taken'} is a file" in result.stderr
    where = tmp_path / "new"
    assert existing(where / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    expect_writable(where / "a")
    assert not where.exists()
    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(ColdstillError) as error:
        expect_writable(where / "a")
    named, reason = str(error.value).split(": cannot be written: ")
    assert named == str(where / "a")
    assert reason.startswith(f"Permission denied in {tmp_path}; ")


def test_the_time_of_a_cut_follows_from_its_passes_over_the_sample() -> None:
    before = ModelSizes(parameters=100, hidden=8, feed_forward=8, layers=4, vocabulary=16)
    after = dataclasses.replace(before, parameters=60, layers=2)
    cut = PruneConfig(layers=2)
    assert pruning_hours(cut, before, after, 3600, None) is None
    # importance, and the loss of the smaller model
    assert pruning_hours(cut, before, after, 3600, 2.0) == pytest.approx(1.6 / 2)
    known = pruning_hours(cut, before, after, 3600, 2.0, known=True)
    assert known == pytest.approx(0.6 / 2)
    # by loss also 4 passes with 3 of the 4 layers, then 3 passes with 2
    by_loss = dataclasses.replace(cut, layers_by="loss")
    assert pruning_hours(by_loss, before, after, 3600, 2.0) == pytest.approx((1.6 + 3 + 1.5) / 2)
