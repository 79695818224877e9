from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import file_sha256
from coldstill.data.store.commit import (
    Commit,
    ShardFile,
    ShardStatistics,
    commit_json,
    parse_commit,
    shard_files,
)
from coldstill.data.store.layout import sealed

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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": -1}, "tokens"),
        ({"tokens": 2**70}, "tokens"),
        ({"tokens": "many"}, "tokens"),
        ({"tokens": None}, "tokens"),
        ({"files": []}, "files"),
        ({"files": [{"name": "", "bytes": 1, "sha256": 5}]}, "files.0.sha256"),
        ({"files": [{"name": "", "bytes": 1, "sha256": "F" * 64}]}, "files.0.sha256"),
        ({"files": [{"name": "", "bytes": -1, "sha256": "0" * 64}]}, "files.0.bytes"),
        ({"statistics": {"loss": "low"}}, "statistics.loss"),
        ({"statistics": {"luck": 1.0}}, "statistics.luck"),
        ({"statistics": {"entropy_bins": [1] * 1000}}, "statistics.entropy_bins"),
        ({"statistics": {"entropy_bins": [-1]}}, "statistics.entropy_bins.0"),
        ({"weather": "fine"}, "weather"),
    ],
)
def test_a_damaged_record_names_file_and_field(change: dict[str, Any], named: str) -> None:
    assert refusal(sealed(asdict(COMMIT) | change)).startswith(f"{WHERE}: {named}: ")


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "x" * 5000,
        "../00001.arrow",
        "a/../../b",
        "/etc/passwd",
        "a//b",
        ".hidden",
        "a\\b",
        "a\nb",
    ],
)
def test_a_file_outside_the_shard_is_refused(name: str) -> None:
    file = {"name": name, "bytes": 1, "sha256": "0" * 64}
    assert refusal(sealed(asdict(COMMIT) | {"files": [file]})).startswith(f"{WHERE}: files.0.name")


@pytest.mark.parametrize("name", list(asdict(COMMIT)))
def test_a_record_without_one_of_its_fields_is_refused(name: str) -> None:
    content = asdict(COMMIT)
    del content[name]
    assert name in refusal(sealed(content))


@pytest.mark.parametrize("value", [None, "", "0" * 64, 3])
def test_a_record_that_does_not_match_its_seal_is_refused(value: Any) -> None:
    content = asdict(COMMIT) | {"seal": value}
    assert refusal(content) == f"{WHERE}: damaged: its contents do not match their seal"


def test_every_number_of_a_record_is_under_its_seal() -> None:
    content = sealed(asdict(COMMIT))
    content["statistics"]["loss"] += 1e-9
    assert "seal" in refusal(content)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff", b"[" * 99999])
def test_content_that_is_not_a_record_is_refused(content: bytes) -> None:
    with pytest.raises(ColdstillError) as caught:
        parse_commit(content, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ColdstillError) as caught:
        parse_commit(json.dumps(content).encode(), WHERE)
    assert "\n" not in str(caught.value)
    return str(caught.value)
