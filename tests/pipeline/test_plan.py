"""What a recipe will do and cost."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.pipeline.planning.sizes import expected_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)
ANSWER = {"role": "assistant", "content": "!"}


def facts(desk: Desk, *arguments: str) -> Any:
    """The plan as JSON."""
    return json.loads(desk.done("plan", "r.toml", "--json", *arguments).stdout)


def test_a_plan_before_anything_is_done_touches_nothing_and_estimates(
    desk: Desk, texts: Path
) -> None:
    before = desk.snapshot()
    plan = facts(desk)
    text = desk.done("plan", "r.toml").stdout
    assert desk.snapshot() == before
    assert not (desk.root / "runs").exists()
    size = sum(path.stat().st_size for path in texts.iterdir())
    assert plan["source_bytes"] == size
    assert plan["sources"] == 60
    assert plan["counted"] is False
    assert plan["basis"] == "estimated from all 60 documents"
    # 320 tokens, or 336 with the padding of the teacher, which nobody can tell yet
    embeddings, layer = 336 * 32, 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    assert plan["students"] == {
        name: {
            "steps": 3, "tokens": 768, "parameters": embeddings + layer + 32, "done": False,
            "note": None, "not_exported_to": [],
        }
        for name in ("small", "baseline")
    }  # fmt: skip
    assert plan["free_bytes"] > 0
    lines = text.splitlines()
    first_words = [line.split()[0] for line in lines if not line.startswith(" ")]
    stages = ["corpus", "note", "teacher", "train", "heldout", "student", "student"]
    assert first_words == [*stages, "memory", "memory", "memory", "kept", "disk"]
    assert lines[1] == "note         corpus: estimated from all 60 documents"
    assert lines[3].endswith("to do")
    assert "about" in lines[3]
    assert 0.8 < plan["supervised_share"]["train"] < 1
    assert plan["hours"] == dict.fromkeys(plan["memory"])  # nothing was measured yet


def test_a_plan_foretells_what_is_captured(finished: Desk) -> None:
    afterwards = facts(finished)
    for folder in ("corpus", "logits", "heldout"):
        shutil.rmtree(finished.run / folder)
    before = facts(finished)
    assert before["counted"] is False
    for key in ("sequences", "positions", "supervised_share"):
        assert before[key] == afterwards[key]


def test_a_plan_says_what_it_assumes_without_a_tokenizer(desk: Desk, texts: Path) -> None:
    size = sum(path.stat().st_size for path in texts.iterdir())
    words = ["--set", "teacher.model=ORG/NAME"]
    plan = facts(desk, *words)
    assert sum(plan["positions"].values()) == pytest.approx(size / 4, rel=0.05)
    assert desk.done("plan", "r.toml", *words).stdout.splitlines()[1] == (
        "note         corpus: 4 bytes a token are assumed, for the corpus is not tokenised yet: "
        "the tokenizer of ORG/NAME is not on this machine"
    )
    assert "tokenizer is not trained yet" in desk.done("plan", "demo").stdout


def test_a_plan_refuses_a_corpus_that_cannot_be_prepared(finished: Desk) -> None:
    shutil.rmtree(finished.run / "corpus")
    finished.write("damaged.jsonl.zst", b"no such thing" * 99)
    chats = json.dumps({"messages": [{"role": "user", "content": "?"}, ANSWER]}) + "\n"
    finished.write("chats.jsonl", chats * 9)
    for name, told in (
        ("damaged.jsonl.zst", "cannot be read: it is not compressed with zstd but of another kind"),
        ("chats.jsonl", "a chat, but the tokenizer has no chat template"),
    ):
        line = finished.refused("plan", "r.toml", "--set", f'corpus.files=["{name}"]')
        assert line.startswith(f"error: {name}: {told}")


def test_a_plan_afterwards_counts_and_says_what_is_done(finished: Desk) -> None:
    plan = facts(finished)
    assert plan["counted"] is True
    assert all(student["done"] for student in plan["students"].values())
    for split, folder in (("train", "logits"), ("heldout", "heldout")):
        store = open_store(finished.run / folder)
        said = plan["stores"][split]
        assert (said["shards_done"], said["shards"]) == (store.manifest.shards,) * 2
        if split == "train":
            record = finished.json("corpus", "corpus.json")["splits"]["train"]
            assert plan["supervised_share"]["train"] == round(
                record["positions"] / record["tokens"], 4
            )
        stored = sum(commit.bytes for commit in store.commits())
        assert said["positions"] == store.positions
        assert (said["bytes"], said["bytes_missing"], said["shards_missing"]) == (stored, 0, 0)
        assert said["measured"] == "store"
        assert said["bytes_per_position"] == round(stored / store.positions, 1)
    text = finished.done("plan", "r.toml").stdout
    assert "to do" not in text
    assert "about" not in "".join(text.splitlines()[:6])
    assert text.splitlines()[-1].startswith("disk         nothing more to write, ")


def test_a_plan_of_a_killed_capture_counts_its_shards(finished: Desk) -> None:
    whole = facts(finished)
    commit = finished.json("logits", "shards", "00001.json")
    (finished.run / "logits" / "shards" / "00001.json").unlink()
    plan = facts(finished)
    said = plan["stores"]["train"]
    assert said["shards_done"] == said["shards"] - 1
    assert said["shards_missing"] == 1
    assert said["positions"] == whole["stores"]["train"]["positions"]
    # what is there is counted, what is missing is as large as the rest
    bytes_here = whole["stores"]["train"]["bytes"] - sum(f["bytes"] for f in commit["files"])
    assert said["bytes"] - said["bytes_missing"] == bytes_here
    width = bytes_here / (said["positions"] - commit["positions"])
    assert said["bytes_missing"] == pytest.approx(width * commit["positions"], abs=1)
    speed = finished.json("logits", "measurements.json")["capture_tokens_per_second"]
    assert plan["tokens_per_second"] == speed
    hours = commit["sequences"] * 32 / speed / 3600
    assert plan["hours"]["teacher-logits"] == pytest.approx(hours)
    assert whole["hours"]["teacher-logits"] == 0
    text = finished.done("plan", "r.toml").stdout
    assert f"{said['shards_done']} of {said['shards']} shards, 1 missing" in text
    assert f" to go at {speed:,.0f} tokens/s" in text


def test_a_sample_of_the_corpus_is_planned_as_one(finished: Desk) -> None:
    shutil.rmtree(finished.run / "logits")
    whole = facts(finished)["stores"]["train"]
    some = facts(finished, "--set", "logits.sequences=10")["stores"]["train"]
    sequences = facts(finished)["sequences"]["train"]
    assert some["positions"] == pytest.approx(whole["positions"] * 10 / sequences, abs=1)
    assert (whole["counted"], some["counted"]) == (True, False)
    assert (whole["sequences"], some["sequences"]) == (sequences, 10)
    assert whole["shards"] == -(-sequences // 20)


def test_students_take_as_long_as_their_last_steps_foretell(finished: Desk) -> None:
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


def test_a_capture_is_held_against_four_others(desk: Desk) -> None:
    for settings in ([], ["logits.head=16", "logits.tail=16"], ["logits.codec=plain"]):
        plan = facts(desk, *[word for s in settings for word in ("--set", s)])
        own = (plan["capture"]["head"], plan["capture"]["tail"], plan["codec"])
        others = [(way["head"], way["tail"], way["codec"]) for way in plan["alternatives"]]
        assert len({*others, own}) == 5
        assert (*own[:2], "compact" if own[2] == "plain" else "plain") in others
        positions = plan["stores"]["train"]["positions"]
        for way in plan["alternatives"]:
            foretold = expected_bytes(Capture(head=way["head"], tail=way["tail"]), way["codec"])
            assert (way["bytes_per_position"], way["bytes"]) == (foretold, positions * foretold)


def test_memory_follows_the_models_and_is_unknown_without_them(desk: Desk) -> None:
    memory = facts(desk)["memory"]
    larger = facts(desk, "--set", "students.small.architecture.hidden=64")["memory"]
    assert larger["train-student small"] > memory["train-student small"]
    assert larger["teacher-logits"] == memory["teacher-logits"]
    nowhere = facts(desk, "--set", "teacher.model=ORG/NAME")["memory"]
    assert nowhere == dict.fromkeys(memory)
    text = desk.done("plan", "r.toml", "--set", "teacher.model=ORG/NAME").stdout
    assert "memory       teacher-logits: unknown, its model is not on this machine" in text


@pytest.mark.parametrize(
    ("capture", "expected"),
    [
        (Capture(head=16, tail=0), 16 * 8 + 12),
        (Capture(head=0, tail=16), 16 * 4 + 12),
        (Capture(head=16, tail=16, tail_logprobs=True), 16 * 8 + 16 * 8 + 12),
        (Capture(head=16, tail=16, temperatures=(2.0,)), 16 * 8 + 16 * 8 + 12 + 4),
    ],
)
def test_a_position_costs_what_its_columns_hold(capture: Capture, expected: int) -> None:
    assert expected_bytes(capture, "plain") == expected + 8  # its token, position and borders


def test_a_compact_store_is_about_as_large_as_foretold(desk: Desk) -> None:
    foretold = facts(desk)["stores"]["train"]["bytes_per_position"]
    desk.done("teacher-logits", "r.toml")
    store = open_store(desk.run / "logits")
    # of a store of a few hundred positions much is file format
    stored = sum(commit.bytes for commit in store.commits()) / store.positions
    assert foretold < stored < 20 * foretold


def test_the_built_in_recipe_can_be_planned_on_any_machine(desk: Desk) -> None:
    text = desk.done("plan", "demo").stdout
    assert "teacher      trained here, not yet" in text
    assert "students" not in text


def test_a_plan_says_what_a_student_cannot_be_exported_to(desk: Desk) -> None:
    sizes = "layers = 1, hidden = 32, heads = 2, feed_forward = 64"
    desk.edit(
        "[students.baseline]",
        f'[students.own]\narchitecture = {{ family = "falcon", {sizes} }}\n'
        "train = { steps = 1, batch_tokens = 256 }\n[students.baseline]",
    )
    assert facts(desk)["students"]["own"]["not_exported_to"] == ["gguf-f16", "gguf-q8_0"]
    note = "students.own: a student of this family cannot be exported to gguf-f16, gguf-q8_0"
    text = desk.done("plan", "r.toml").stdout
    assert text.count("cannot be exported") == 1
    assert note in text
