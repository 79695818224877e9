from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from coldstill.data.files import file_sha256, files_sha256, json_sha256, tokens_sha256

if TYPE_CHECKING:
    from pathlib import Path


def make(folder: Path, contents: dict[str, str]) -> list[Path]:
    folder.mkdir()
    for name, text in contents.items():
        (folder / name).write_text(text)
    return [folder / name for name in contents]


def test_a_file_is_hashed_whole_however_long(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1):
        data = bytes(i % 251 for i in range(256)) * (size // 256 + 1)
        path.write_bytes(data[:size])
        assert file_sha256(path) == hashlib.sha256(data[:size]).hexdigest()


def test_files_are_the_same_in_any_folder_and_order(tmp_path: Path) -> None:
    contents = {"a": "1", "b": "2", "c": ""}
    here, there = make(tmp_path / "x", contents), make(tmp_path / "y", contents)
    assert files_sha256(here) == files_sha256(list(reversed(there)))


def test_files_differ_by_content_name_and_border(tmp_path: Path) -> None:
    variants = [
        {"a": "1", "b": "2"},
        {"a": "1", "b": "3"},
        {"a": "1", "c": "2"},
        {"a": "2", "b": "1"},
        {"a": "12", "b": ""},
        {"a": "1"},
        {},
    ]
    found = {files_sha256(make(tmp_path / str(i), v)) for i, v in enumerate(variants)}
    assert len(found) == len(variants)


def test_json_and_tokens_are_the_same_in_any_order() -> None:
    assert json_sha256({"a": 1, "b": {"c": 2, "d": [3]}}) == json_sha256(
        {"b": {"d": [3], "c": 2}, "a": 1}
    )
    values = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]}, {}, {"a": None}, ["a", 1]]
    assert len({json_sha256(value) for value in values}) == len(values)
    assert tokens_sha256({"a": 0, "b": 1}) == tokens_sha256({"b": 1, "a": 0})
    tables = [{"a": 0, "b": 1}, {"a": 1, "b": 0}, {"a": 0, "b": 2}, {"a": 0}, {"a": 0, "é": 1}]
    assert len({tokens_sha256(table) for table in tables}) == len(tables)
