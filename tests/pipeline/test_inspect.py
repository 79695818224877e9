"""What a store says of itself, without loading anything but its records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.manifest import read_manifest
from coldstill.data.reader import open_store
from coldstill.pipeline.inspect_store import _ranges

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


def test_inspect_tells_what_is_in_a_store(finished: Desk) -> None:
    store = open_store(finished.run / "logits")
    block = next(iter(store.batches(len(store))))
    told = json.loads(finished.done("inspect", "runs/r/logits", "--json").stdout)
    assert told["manifest"] == finished.json("logits", "manifest.json")
    assert told["shards"] == told["shards_done"] == store.manifest.shards
    assert told["shards_missing"] == []
    assert told["sequences"] == len(store)
    assert told["tokens"] == len(block.sequences.tokens.values)
    assert told["positions"] == len(block.targets)
    loss = -block.targets.label_logprob.astype(np.float64).mean()
    assert told["teacher_loss"] == pytest.approx(loss, rel=1e-6)
    assert told["teacher_perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert told["teacher_entropy"] == pytest.approx(block.targets.entropy.mean(), rel=1e-5)
    mass = np.exp(block.targets.head_logprobs).sum(1).mean()
    assert told["head_mass"] == pytest.approx(mass, rel=1e-5)
    files = (finished.run / "logits" / "shards").glob("*.arrow")
    assert told["bytes"] == sum(path.stat().st_size for path in files)


def test_inspect_is_readable(finished: Desk) -> None:
    lines = finished.done("inspect", "runs/r/logits").stdout.splitlines()
    names = [line[:11].strip() for line in lines]
    assert names == [
        "store",
        "teacher",
        "tokenizer",
        "corpus",
        "packing",
        "capture",
        "shards",
        "holds",
        "size",
        "says",
        "head holds",
    ]
    assert "runs/r/logits (arrow, plain)" in lines[0]
    assert lines[1].split()[1] == "teacher"
    assert "320 tokens" in lines[2]
    assert lines[4].endswith("up to 32 tokens, documents packed together, kept apart by positions")
    assert "head 4, tail 4, temperatures 1.0" in lines[5]
    assert lines[6].endswith(", complete")
    assert max(len(line) for line in lines) < 120


def test_inspect_names_the_shards_that_are_missing(finished: Desk) -> None:
    shards = finished.run / "logits" / "shards"
    for i in (0, 2):
        (shards / f"{i:05d}.json").unlink()
    manifest = read_manifest(finished.run / "logits" / "manifest.json")
    told = json.loads(finished.done("inspect", "runs/r/logits", "--json").stdout)
    assert told["shards_missing"] == [0, 2]
    assert told["shards_done"] == manifest.shards - 2
    assert "missing 0, 2" in finished.done("inspect", "runs/r/logits").stdout


def test_inspect_of_a_store_that_holds_no_shard_yet(finished: Desk) -> None:
    for record in (finished.run / "logits" / "shards").glob("*.json"):
        record.unlink()
    text = finished.done("inspect", "runs/r/logits").stdout
    assert "0 sequences" in text
    assert "says" not in text


def test_inspect_touches_nothing(finished: Desk) -> None:
    before = finished.snapshot()
    finished.done("inspect", "runs/r/logits")
    finished.done("inspect", "runs/r/heldout", "--json")
    assert finished.snapshot() == before


def test_missing_shards_are_told_in_ranges() -> None:
    assert _ranges([0, 1, 2, 3, 7]) == "0-3, 7"
    assert _ranges([5]) == "5"
    assert _ranges([1, 2, 4, 5]) == "1-2, 4-5"
