from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.codecs import CODECS, CodecError
from coldstill.data.codecs.plain import PlainCodec
from coldstill.data.errors import ColdstillError
from coldstill.data.files import write_json
from coldstill.data.places.local import LocalPlace
from coldstill.data.schema import Capture
from coldstill.data.store.layout import sealed
from coldstill.data.store.manifest import (
    Manifest,
    difference,
    format_settings,
    parse_manifest,
    read_manifest,
)
from coldstill.data.store.writer import ShardWriter
from oracles import digests, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = manifest_for(random_block(0, 10))
CHOICES: dict[str, Any] = {
    "corpus.split": "heldout",
    "packing.isolation": "mask",
    "codec.name": "other",
    "parts": [{"corpus": "x", "documents": 9, "packing": "y", "sequences": 10}],
}


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= (
            leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
        )
    return found


def changed(field: str, value: Any) -> dict[str, Any]:
    """The manifest as JSON, with one field changed."""
    content: dict[str, Any] = json.loads(json.dumps(MANIFEST.to_json()))
    *sections, key = field.split(".")
    inner = content
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return content


def another(field: str, value: Any) -> Any:
    """Another value that the field may have."""
    if field in CHOICES:
        return CHOICES[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return (
        [*value, 7.0 if "temperatures" in field else 7]
        if isinstance(value, (list, tuple))
        else f"x{value}"
    )


FIELDS = [f for f in leaves(MANIFEST.to_json()) if f not in ("format", "version", "seal")]
IDENTITY = [
    field
    for field in FIELDS
    if field not in ("teacher.name", "store.name") and not field.startswith("error.")
]


def read_back(tmp_path: Path, content: Any) -> Manifest:
    path = tmp_path / "manifest.json"
    value = sealed(content) if isinstance(content, dict) else content
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_manifest(LocalPlace(tmp_path))


def refusal(tmp_path: Path, content: Any) -> str:
    with pytest.raises(ColdstillError) as caught:
        read_back(tmp_path, content)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert "\n" not in text
    return text


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", MANIFEST.to_json())
    place = LocalPlace(tmp_path)
    assert read_manifest(place) == MANIFEST
    assert difference(read_manifest(place), MANIFEST) is None
    assert not any(field.startswith("student") for field in FIELDS)


@pytest.mark.parametrize(
    ("sequences", "shard", "block"), [(0, 1, 1), (1, 5, 2), (10, 4, 3), (12, 4, 4), (7, 3, 9)]
)
def test_shards_and_blocks_divide_the_sequences(sequences: int, shard: int, block: int) -> None:
    manifest = replace(MANIFEST, sequences=sequences, shard_sequences=shard, block_sequences=block)
    found: list[int] = []
    for index in range(manifest.shards):
        rows = manifest.shard_rows(index)
        assert 0 < len(rows) <= shard
        blocks = [manifest.block_rows(index, b) for b in range(-(-len(rows) // block))]
        assert all(0 < len(b) <= block for b in blocks)
        assert [row for b in blocks for row in b] == list(rows)
        found += rows
    assert found == list(range(sequences))


@pytest.mark.parametrize("field", IDENTITY)
def test_a_changed_field_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setitem(CODECS, "other", PlainCodec)
    root = tmp_path / "store"
    block = random_block(0, 10)
    write_missing(root, MANIFEST, block)
    before = digests(root)
    old = leaves(MANIFEST.to_json())[field]
    now = another(field, old)
    other = read_back(tmp_path, changed(field, now))
    with pytest.raises(ColdstillError) as caught, ShardWriter(root, other):
        pass
    text = str(caught.value)
    assert text.startswith(f"{root}: made differently: {field}: ")
    assert "\n" not in text
    for value in (old, now):
        shown = str(tuple(value) if isinstance(value, (list, tuple)) else value)
        assert (shown if len(shown) <= 16 else f"{shown[:12]}...") in text
    assert digests(root) == before


def test_every_field_is_compared() -> None:
    other = replace(MANIFEST, store={"name": "other", "level": 3})
    assert difference(MANIFEST, other) == "store.level: None in the store, 3 now"
    assert "store.name" in str(difference(MANIFEST, replace(MANIFEST, store={"name": "other"})))
    assert len(FIELDS) > 20


def test_a_teacher_may_move_to_another_folder(tmp_path: Path) -> None:
    write_missing(tmp_path, MANIFEST, random_block(0, 10))
    moved = replace(MANIFEST, teacher=replace(MANIFEST.teacher, name="elsewhere/teacher"))
    assert difference(MANIFEST, moved) is None
    with ShardWriter(tmp_path, moved) as writer:
        assert writer.missing() == []


def test_the_cause_of_several_differences_is_named() -> None:
    other = replace(
        MANIFEST,
        sequences=99,
        packing=replace(MANIFEST.packing, fingerprint="x", sequence_length=64),
        corpus=replace(MANIFEST.corpus, fingerprint="y"),
    )
    assert str(difference(MANIFEST, other)).startswith("corpus.fingerprint")
    cause = replace(other, corpus=MANIFEST.corpus)
    assert str(difference(MANIFEST, cause)).startswith("packing.sequence_length: 12 in the store")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_named(tmp_path: Path, field: str) -> None:
    if field.startswith(("codec.", "store.")):
        return  # these are checked when the codec and the store are made
    is_number = field == "capture.temperatures" or field.startswith("error.")
    for wrong in ({"a": 1}, None, "x" if is_number else 1.5):
        assert f": {field}" in refusal(tmp_path, changed(field, wrong))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequences", -1),
        ("sequences", "10"),
        ("sequences", 2**70),
        ("sequences", 1e300),
        ("shard_sequences", 0),
        ("block_sequences", 2**31),
        ("tokenizer.size", 0),
        ("packing.sequence_length", 1),
        ("packing.separator", [-1]),
        ("corpus.split", "test"),
        ("capture.head", True),
        ("teacher.surname", "x"),
        ("students", 3),
    ],
)
def test_a_field_out_of_bounds_or_unknown_is_named(tmp_path: Path, field: str, value: Any) -> None:
    assert f": {field}" in refusal(tmp_path, changed(field, value))


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    content = MANIFEST.to_json()
    del content["teacher"]["fingerprint"]
    assert ": teacher.fingerprint: " in refusal(tmp_path, content)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True, 10**30])
def test_another_version_of_the_format_is_refused(tmp_path: Path, version: Any) -> None:
    text = refusal(tmp_path, changed("version", version))
    assert f"format version {version!r}, this coldstill reads 2" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": "other"}', "[" * 100_000])
def test_content_that_is_not_a_manifest_is_refused(tmp_path: Path, content: str) -> None:
    text = refusal(tmp_path, content)
    assert "not the manifest of a coldstill store" in text or "cannot be read as JSON" in text


def test_a_manifest_that_does_not_match_its_seal_is_refused(tmp_path: Path) -> None:
    content = MANIFEST.to_json()
    content["capture"]["seed"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ColdstillError, match="damaged: its contents do not match their seal"):
        read_manifest(LocalPlace(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequences", 2**62),
        ("capture.head", 41),
        ("capture.head", -1),
        ("capture.head", 10**400),
        ("capture.tail", 2**40),
        ("capture.seed", 2**70),
        ("capture.temperatures", [0.0]),
        ("capture.temperatures", [1e9]),
        ("error.rounding", 1e308),
        ("codec", {"name": "compact", "vocabulary": 40, "temperature": 1e300}),
    ],
)
def test_impossible_numbers_are_refused_before_they_are_used(
    tmp_path: Path, field: str, value: Any
) -> None:
    assert f": {field.partition('.')[0]}" in refusal(tmp_path, changed(field, value))


def test_a_measured_error_is_not_compared() -> None:
    other = replace(MANIFEST, error=CodecError(maximum=0.1, measured=0.01, kl=0.001))
    assert difference(MANIFEST, other) is None


def test_invalid_text_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, changed("teacher.name", "\ud800"))
    assert "manifest.json" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("part", ["codec", "store"])
@pytest.mark.parametrize("value", [{"name": "zip"}, {"name": ["x"]}, {"name": None}, {}, {"x": 1}])
def test_an_unknown_codec_or_store_is_named_with_the_known_ones(
    tmp_path: Path, part: str, value: dict[str, Any]
) -> None:
    text = refusal(tmp_path, changed(part, value))
    assert f": {part} {value.get('name')!r} is not known" in text
    assert ("plain" if part == "codec" else "arrow") in text


def test_an_unknown_setting_of_a_codec_is_named(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, codec={"name": "plain", "bits": 3})
    with pytest.raises(ColdstillError, match=r"codec 'plain': .*'bits'"):
        manifest.make_codec(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": 14},
        {"levels": 255},
        {"levels": "many"},
        {"levels": 100.5},
        {"vocabulary": 0},
        {"vocabulary": 2**24 + 1},
        {"temperature": 0.5},
        {"temperature": None},
    ],
)
def test_a_setting_that_a_codec_cannot_take_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    value = {"name": "compact", "vocabulary": 40, "levels": 127, "temperature": 1.0} | settings
    assert ": codec 'compact': " in refusal(tmp_path, changed("codec", value))


def test_a_name_becomes_the_settings_that_fit_the_capture() -> None:
    capture = Capture(temperatures=(0.5, 4.0))
    made = format_settings("compact", "arrow", 50_000, capture)
    codec = {"name": "compact", "vocabulary": 50_000, "levels": 127, "temperature": 4.0}
    assert made == {"codec": codec, "store": {"name": "arrow", "zstd": 3}}
    plain = format_settings("plain", {"name": "arrow", "zstd": 9}, 50_000, capture)
    assert plain == {"codec": {"name": "plain"}, "store": {"name": "arrow", "zstd": 9}}
    fewer = format_settings({"name": "compact", "levels": 64}, "arrow", 9, Capture())
    assert fewer["codec"]["levels"] == 64


@pytest.mark.parametrize(
    ("codec", "store", "message"),
    [
        ("zip", "arrow", "codec 'zip' is not known"),
        ("plain", "zip", "store 'zip' is not known"),
        ({"name": "compact", "level": 3}, "arrow", "codec 'compact': .*'level'"),
        ({"name": "plain", "levels": 3}, "arrow", "codec 'plain': .*'levels'"),
        ({"name": "compact", "levels": 9}, "arrow", "codec 'compact': levels 9: 15 to 254"),
        ("plain", {"name": "arrow", "zstd": 99}, "store 'arrow': zstd 99"),
        ({}, "arrow", "codec None is not known"),
    ],
)
def test_invalid_format_settings_are_reported_in_one_line(
    codec: Any, store: Any, message: str
) -> None:
    with pytest.raises(ColdstillError, match=message) as caught:
        format_settings(codec, store, 50_000, Capture())
    assert "\n" not in str(caught.value)


def test_remote_code_is_recorded_only_if_it_ran() -> None:
    """The field is missing in stores of earlier versions, which stay equal."""
    assert "trust_remote_code" not in MANIFEST.to_json()["teacher"]
    ran = replace(MANIFEST, teacher=replace(MANIFEST.teacher, trust_remote_code=True))
    again = parse_manifest(json.dumps(ran.to_json()).encode(), "m")
    assert again == ran
    assert parse_manifest(json.dumps(MANIFEST.to_json()).encode(), "m") == MANIFEST
    told = difference(MANIFEST, ran)
    assert told is not None
    assert told.startswith("teacher.trust_remote_code: None in the store, True now")
