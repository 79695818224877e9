from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.commit import Commit, ShardStatistics, read_commit
from coldstill.data.errors import ColdstillError
from coldstill.data.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = Commit(
    shard=3,
    sequences=4,
    documents=7,
    tokens=40,
    positions=30,
    bytes=1000,
    sha256="0" * 64,
    statistics=ShardStatistics(loss=1.5, entropy=2.5, correct=3),
)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "00003.json", asdict(COMMIT))
    assert read_commit(tmp_path / "00003.json") == COMMIT


def test_sums_are_added_field_by_field() -> None:
    one = ShardStatistics(
        loss=1.0, entropy=2.0, head_mass=3.0, correct=4, separator_mass=5.0, separators=6
    )
    assert asdict(one.plus(one)) == {name: 2 * value for name, value in asdict(one).items()}
    assert one.plus(ShardStatistics()) == one


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": -1}, "tokens"),
        ({"tokens": 2**70}, "tokens"),
        ({"tokens": "many"}, "tokens"),
        ({"tokens": None}, "tokens"),
        ({"sha256": 5}, "sha256"),
        ({"statistics": {"loss": "low"}}, "statistics.loss"),
        ({"statistics": {"luck": 1.0}}, "statistics.luck"),
        ({"weather": "fine"}, "weather"),
    ],
)
def test_a_damaged_record_names_file_and_field(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "00003.json"
    path.write_text(json.dumps(asdict(COMMIT) | change))
    with pytest.raises(ColdstillError) as caught:
        read_commit(path)
    assert str(caught.value).startswith(f"{path}: {named}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(asdict(COMMIT)))
def test_a_record_without_one_of_its_fields_is_refused(tmp_path: Path, name: str) -> None:
    content = asdict(COMMIT)
    del content[name]
    path = tmp_path / "00003.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ColdstillError, match=name):
        read_commit(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "00003.json"
    path.write_text(content)
    with pytest.raises(ColdstillError) as caught:
        read_commit(path)
    assert str(caught.value).startswith(f"{path}: ")
