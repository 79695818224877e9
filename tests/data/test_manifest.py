from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.codecs import CODECS, CodecError
from coldstill.data.codecs.plain import PlainCodec
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
from coldstill.data.store.provenance import Writing
from coldstill.data.store.writer import ShardWriter
from oracles import digests, manifest_for, random_block, write_missing
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

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
        is_leaf = not isinstance(inner, dict)
        found |= {prefix + key: inner} if is_leaf else leaves(inner, f"{prefix}{key}.")
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
    if isinstance(value, (bool, int)):
        return type(value)(not value) if isinstance(value, bool) else value + 1
    if isinstance(value, (list, tuple)):
        return [*value, 7.0 if "temperatures" in field else 7]
    return f"x{value}"


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


def read_refusal(tmp_path: Path, content: Any) -> str:
    message = refusal(read_back, tmp_path, content)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: ")
    return message


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", MANIFEST.to_json())
    place = LocalPlace(tmp_path)
    assert read_manifest(place) == MANIFEST
    assert difference(read_manifest(place), MANIFEST) is None
    assert not any(field.startswith("student") for field in FIELDS)


def test_shards_and_blocks_divide_the_sequences() -> None:
    for sequences, shard, block in ((0, 1, 1), (1, 5, 2), (10, 4, 3), (12, 4, 4), (7, 3, 9)):
        sizes: dict[str, Any] = {
            "sequences": sequences,
            "shard_sequences": shard,
            "block_sequences": block,
        }
        manifest = replace(MANIFEST, **sizes)
        found: list[int] = []
        for index in range(manifest.shards):
            rows = manifest.shard_rows(index)
            assert 0 < len(rows) <= shard
            blocks = [manifest.block_rows(index, b) for b in range(-(-len(rows) // block))]
            assert all(0 < len(b) <= block for b in blocks)
            assert [row for b in blocks for row in b] == list(rows)
            found += rows
        assert found == list(range(sequences))


def test_a_changed_field_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "other", PlainCodec)
    root = tmp_path / "store"
    write_missing(root, MANIFEST, random_block(0, 10))
    before = digests(root)
    for field in IDENTITY:
        old = leaves(MANIFEST.to_json())[field]
        now = another(field, old)
        other = read_back(tmp_path, changed(field, now))
        message = refusal(ShardWriter(root, other).__enter__)
        assert message.startswith(f"{root}: made differently: {field}: ")
        for value in (old, now):
            shown = str(tuple(value) if isinstance(value, (list, tuple)) else value)
            assert (shown if len(shown) <= 16 else f"{shown[:12]}...") in message
        assert digests(root) == before


def test_every_field_is_compared_and_the_cause_of_several_differences_named() -> None:
    other = replace(MANIFEST, store={"name": "other", "level": 3})
    assert difference(MANIFEST, other) == "store.level: None in the store, 3 now"
    assert "store.name" in str(difference(MANIFEST, replace(MANIFEST, store={"name": "other"})))
    assert len(FIELDS) > 20
    other = replace(
        MANIFEST,
        sequences=99,
        packing=replace(MANIFEST.packing, fingerprint="x", sequence_length=64),
        corpus=replace(MANIFEST.corpus, fingerprint="y"),
    )
    assert str(difference(MANIFEST, other)).startswith("corpus.fingerprint")
    cause = replace(other, corpus=MANIFEST.corpus)
    assert str(difference(MANIFEST, cause)).startswith("packing.sequence_length: 12 in the store")


def test_the_folder_of_the_teacher_and_the_measured_error_may_differ(tmp_path: Path) -> None:
    write_missing(tmp_path, MANIFEST, random_block(0, 10))
    teacher = replace(MANIFEST.teacher, name="elsewhere/teacher")
    error = CodecError(maximum=0.1, measured=0.01, kl=0.001)
    moved = replace(MANIFEST, teacher=teacher, error=error)
    assert difference(MANIFEST, moved) is None
    with ShardWriter(tmp_path, moved) as writer:
        assert writer.missing() == []


WRONG: list[tuple[str, Any]] = [
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
]
"""Values out of bounds, and fields that do not exist."""
IMPOSSIBLE: list[tuple[str, Any]] = [
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
]
"""Numbers that must not be used; the message names their section."""


def test_a_field_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    for field, value in WRONG:
        assert f": {field}" in read_refusal(tmp_path, changed(field, value))
    for field, value in IMPOSSIBLE:
        assert f": {field.partition('.')[0]}" in read_refusal(tmp_path, changed(field, value))
    for field in FIELDS:
        if field.startswith(("codec.", "store.")):
            continue  # these are checked when the codec and the store are made
        is_number = field == "capture.temperatures" or field.startswith("error.")
        for wrong in ({"a": 1}, None, "x" if is_number else 1.5):
            assert f": {field}" in read_refusal(tmp_path, changed(field, wrong))
    content = MANIFEST.to_json()
    del content["teacher"]["fingerprint"]
    assert ": teacher.fingerprint: " in read_refusal(tmp_path, content)
    assert "manifest.json" in read_refusal(tmp_path, changed("teacher.name", "\ud800"))


def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    for version in (0, 1, 4, "3", 3.0, [3], None, True, 10**30):
        message = read_refusal(tmp_path, changed("version", version))
        assert f"format version {version!r}, this coldstill reads 2 and 3" in message


def test_content_that_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    for content in ("", "{", "[]", "3", '{"format": "other"}', "[" * 100_000):
        message = read_refusal(tmp_path, content)
        expected = ("not the manifest of a coldstill store", "cannot be read as JSON")
        assert any(text in message for text in expected)
    value = MANIFEST.to_json()
    value["capture"]["seed"] += 1
    message = read_refusal(tmp_path, json.dumps(value))
    assert "damaged: its contents do not match their seal" in message


def test_unknown_codecs_stores_and_settings_are_named(tmp_path: Path) -> None:
    unknown: list[dict[str, Any]] = [{"name": "zip"}, {"name": ["x"]}, {"name": None}, {}, {"x": 1}]
    for part, known in (("codec", "plain"), ("store", "arrow")):
        for value in unknown:
            message = read_refusal(tmp_path, changed(part, value))
            assert f": {part} {value.get('name')!r} is not known" in message
            assert known in message
    message = refusal(replace(MANIFEST, codec={"name": "plain", "bits": 3}).make_codec, tmp_path)
    assert "codec 'plain': " in message
    assert "'bits'" in message
    settings: list[dict[str, Any]] = [
        *({"levels": levels} for levels in (14, 255, "many", 100.5)),
        *({"vocabulary": size} for size in (0, 2**24 + 1)),
        *({"temperature": temperature} for temperature in (0.5, None)),
    ]
    for wrong in settings:
        value = {"name": "compact", "vocabulary": 40, "levels": 127, "temperature": 1.0} | wrong
        assert ": codec 'compact': " in read_refusal(tmp_path, changed("codec", value))


def test_a_name_becomes_the_settings_that_fit_the_capture() -> None:
    capture = Capture(temperatures=(0.5, 4.0))
    made = format_settings("compact", "arrow", 50_000, capture)
    codec = {"name": "compact", "vocabulary": 50_000, "levels": 127, "temperature": 4.0}
    assert made["codec"] == {**codec, "frequent": []}
    assert made["store"] == {"name": "arrow", "zstd": 1}
    plain = format_settings("plain", {"name": "arrow", "zstd": 9}, 50_000, capture)
    assert plain == {"codec": {"name": "plain"}, "store": {"name": "arrow", "zstd": 9}}
    fewer = format_settings({"name": "compact", "levels": 64}, "arrow", 9, Capture())
    assert fewer["codec"]["levels"] == 64


def test_invalid_format_settings_are_reported_in_one_line() -> None:
    cases: list[tuple[Any, Any, str]] = [
        ("zip", "arrow", "codec 'zip' is not known"),
        ("plain", "zip", "store 'zip' is not known"),
        ({"name": "compact", "level": 3}, "arrow", "codec 'compact': .*'level'"),
        ({"name": "plain", "levels": 3}, "arrow", "codec 'plain': .*'levels'"),
        ({"name": "compact", "levels": 9}, "arrow", "codec 'compact': levels 9: 15 to 254"),
        ("plain", {"name": "arrow", "zstd": 99}, "store 'arrow': zstd 99"),
        ({}, "arrow", "codec None is not known"),
    ]
    for codec, store, message in cases:
        assert re.search(message, refusal(format_settings, codec, store, 50_000, Capture()))


def test_remote_code_is_recorded_only_if_it_ran() -> None:
    """The field is missing in stores of earlier versions, which stay equal."""
    assert "trust_remote_code" not in MANIFEST.to_json()["teacher"]
    ran = replace(MANIFEST, teacher=replace(MANIFEST.teacher, trust_remote_code=True))
    for manifest in (MANIFEST, ran):
        assert parse_manifest(json.dumps(manifest.to_json()).encode(), "m") == manifest
    expected = "teacher.trust_remote_code: None in the store, True now"
    assert str(difference(MANIFEST, ran)).startswith(expected)


def test_who_wrote_the_text_is_sealed_and_absent_elsewhere() -> None:
    assert "written" not in MANIFEST.to_json()
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    own = replace(MANIFEST, written=Writing(fingerprint="ab", round=1, **how))
    content = json.loads(json.dumps(own.to_json()))
    assert parse_manifest(json.dumps(content).encode(), "m") == own
    assert difference(own, MANIFEST) is not None
    content["written"]["round"] = 2
    assert "seal" in refusal(lambda: parse_manifest(json.dumps(content).encode(), "m"))
