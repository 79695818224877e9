"""Commit records of shards and their statistics."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.files import file_sha256
from coldstill.data.schema import Capture
from coldstill.data.store.commit import (
    Commit,
    ShardFile,
    ShardStatistics,
    block_statistics,
    commit_json,
    parse_commit,
    shard_files,
)
from coldstill.data.store.layout import sealed
from oracles import random_block
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

WHERE = "store/shards/00003.json"

COMMIT = Commit(
    shard=3,
    sequences=4,
    documents=7,
    tokens=40,
    positions=30,
    files=(
        ShardFile(name="zarr.json", bytes=10, sha256="0" * 64),
        ShardFile(name="head_ids/c/0", bytes=990, sha256="1" * 64),
    ),
    statistics=ShardStatistics(loss=1.5, entropy=2.5, correct=3),
)


def test_a_record_is_read_as_it_was_written() -> None:
    assert parse_commit(commit_json(COMMIT), WHERE) == COMMIT
    assert COMMIT.bytes == 1000


def test_the_files_of_a_shard_are_listed_with_their_hashes(tmp_path: Path) -> None:
    one = tmp_path / "00000.arrow"
    one.write_bytes(b"abc")
    assert shard_files(one) == (ShardFile(name="", bytes=3, sha256=file_sha256(one)),)
    group = tmp_path / "00000.zarr"
    for name in ("zarr.json", "b/c/0", "a/zarr.json"):
        (group / name).parent.mkdir(parents=True, exist_ok=True)
        (group / name).write_text(name)
    assert [file.name for file in shard_files(group)] == ["a/zarr.json", "b/c/0", "zarr.json"]
    assert [file.bytes for file in shard_files(group)] == [11, 5, 9]


def test_statistics_are_added_field_by_field_and_bin_by_bin() -> None:
    one = ShardStatistics(
        loss=1.0, entropy=2.0, head_mass=3.0, correct=4, separator_mass=5.0, separators=6
    )
    assert one.plus(one) == ShardStatistics(
        loss=2.0, entropy=4.0, head_mass=6.0, correct=8, separator_mass=10.0, separators=12
    )
    assert one.plus(ShardStatistics()) == one
    one = ShardStatistics(entropy_bins=(1, 2), mass_bins=(5,))
    other = ShardStatistics(entropy_bins=(0, 3, 4))
    assert one.plus(other).entropy_bins == other.plus(one).entropy_bins == (1, 5, 4)
    assert one.plus(other).mass_bins == (5,)


def test_a_damaged_record_names_file_and_field() -> None:
    file = {"name": "", "bytes": 1, "sha256": "0" * 64}
    cases: list[tuple[str, dict[str, Any]]] = [
        *(("tokens", {"tokens": tokens}) for tokens in (-1, 2**70, "many", None)),
        ("files", {"files": []}),
        *(("files.0.sha256", {"files": [file | {"sha256": x}]}) for x in (5, "F" * 64)),
        ("files.0.bytes", {"files": [file | {"bytes": -1}]}),
        ("statistics.loss", {"statistics": {"loss": "low"}}),
        ("statistics.luck", {"statistics": {"luck": 1.0}}),
        ("statistics.entropy_bins", {"statistics": {"entropy_bins": [1] * 1000}}),
        ("statistics.entropy_bins.0", {"statistics": {"entropy_bins": [-1]}}),
        ("weather", {"weather": "fine"}),
    ]
    for field, change in cases:
        assert record_refusal(sealed(asdict(COMMIT) | change)).startswith(f"{WHERE}: {field}: ")
    outside = ["..", "../00001.arrow", "a/../../b", "/etc/passwd", "a//b", ".hidden", "a\\b"]
    for name in (*outside, "a\nb", "x" * 5000):  # a file must be inside the shard
        message = record_refusal(sealed(asdict(COMMIT) | {"files": [file | {"name": name}]}))
        assert message.startswith(f"{WHERE}: files.0.name")
    for name in asdict(COMMIT):
        content = asdict(COMMIT)
        del content[name]
        assert name in record_refusal(sealed(content))


def test_a_record_that_does_not_match_its_seal_is_refused() -> None:
    for value in (None, "", "0" * 64, 3):
        content = asdict(COMMIT) | {"seal": value}
        message = f"{WHERE}: damaged: its contents do not match their seal"
        assert record_refusal(content) == message
    content = sealed(asdict(COMMIT))
    content["statistics"]["loss"] += 1e-9
    assert "seal" in record_refusal(content)
    for text in (b"", b"{", b"[]", b"null", b'"text"', b"\xff", b"[" * 99999):
        assert refusal(parse_commit, text, WHERE).startswith(f"{WHERE}: ")


def record_refusal(content: dict[str, Any]) -> str:
    return refusal(parse_commit, json.dumps(content).encode(), WHERE)


@pytest.mark.parametrize("head", [0, 3])
def test_statistics_are_those_of_a_loop(head: int) -> None:
    block = random_block(4, 9, Capture(head=head, tail=2))
    targets, labels_M = block.targets, labels(block.sequences)
    separator = int(labels_M[0])
    sums = dict.fromkeys(["loss", "entropy", "head", "correct", "mass", "separators"], 0.0)
    for m, label in enumerate(labels_M):
        sums["loss"] -= float(targets.label_logprob[m])
        sums["entropy"] += float(targets.entropy[m])
        sums["head"] += sum(float(np.exp(float(x))) for x in targets.head_logprobs[m])
        sums["correct"] += head > 0 and int(targets.head_ids[m][0]) == int(label)
        if label == separator:
            sums["separators"] += 1
            sums["mass"] += float(np.exp(float(targets.label_logprob[m])))
    found = block_statistics(block, (separator, 99), np.full(len(targets), 0.5))
    assert found.loss == pytest.approx(sums["loss"])
    assert found.entropy == pytest.approx(sums["entropy"])
    assert found.head_mass == pytest.approx(sums["head"])
    assert found.correct == sums["correct"]
    assert found.separators == sums["separators"] > 0
    assert found.separator_mass == pytest.approx(sums["mass"])
    assert found.distortion == len(targets) / 2
    assert block_statistics(block, (), np.zeros(len(targets))).separators == 0


def test_histograms_count_every_position_in_its_bin() -> None:
    block = random_block(4, 9)
    count = len(block.targets)
    entropy = np.resize([0.0, 0.49, 0.5, 3.2, 11.4, 11.6, 99.0], count).astype(np.float32)
    block = replace(block, targets=replace(block.targets, entropy=entropy))
    found = block_statistics(block, (), np.zeros(count))
    bins = [sum(min(int(e / 0.5), 23) == b for e in entropy.tolist()) for b in range(24)]
    assert found.entropy_bins == tuple(bins)
    masses = np.exp(block.targets.head_logprobs.astype(float)).sum(1).tolist()
    expected = [sum(min(int(m * 20), 19) == b for m in masses) for b in range(20)]
    assert found.mass_bins == tuple(expected)
    assert len(set(expected)) > 3
