"""Files that are written whole, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import (
    SCRATCH_PREFIX,
    file_sha256,
    files_sha256,
    json_sha256,
    read_json,
    remove_scratch,
    tokens_sha256,
    whole_file,
    whole_folder,
    write_json,
)
from refusals import refusal

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def half_written(path: Path, error: BaseException | None) -> None:
    with whole_file(path) as scratch:
        scratch.write_text("half")
        if error is not None:
            raise error


def half_made(path: Path, error: BaseException | None) -> None:
    with whole_folder(path) as scratch:
        (scratch / "new").write_text("half")
        if error is not None:
            raise error


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with whole_file(path) as scratch:
        scratch.write_text("new")
        assert not path.exists()
        assert scratch.parent == path.parent  # a rename works only within one file system
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "file"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(type(error)):
            half_written(path, error)
        assert names(tmp_path) == ([] if before is None else ["file"])
    assert path.read_text() == "old"


@pytest.mark.parametrize("owner", [None, os, Path])
def test_a_full_disk_is_reported_in_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    """While the file is written, or at the last moment: in fsync or in the rename."""
    path = tmp_path / "file"
    path.write_text("old")
    if owner is not None:
        monkeypatch.setattr(owner, "fsync" if owner is os else "replace", failing(FULL_DISK))
    message = refusal(half_written, path, FULL_DISK if owner is None else None)
    assert message.startswith(f"{path}: the disk is full")
    assert "free some space" in message
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_data_is_on_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append(f"rename {self}")
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("file names of descriptors are read from /proc")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with whole_file(tmp_path / "file") as scratch:
        scratch.write_text("x")
    assert events == [f"sync {scratch}", f"rename {scratch}", f"sync {tmp_path}"]


def test_other_errors_are_one_line_if_the_user_can_act(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refusal(write_json, tmp_path / "file" / "value.json", 1)
    error = PermissionError(errno.EACCES, "Permission denied")
    assert "cannot be written" in refusal(half_written, tmp_path / "new", error)
    with pytest.raises(OSError, match="Input/output"):
        half_written(tmp_path / "file", OSError(errno.EIO, "Input/output error"))


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for content in ("first", "second"):
        with whole_folder(path) as scratch:
            (scratch / "inner").mkdir()
            (scratch / "inner" / content).write_text(content)
            assert not (path / "inner" / content).exists()
        assert names(path / "inner") == [content]
        assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt(), ValueError("x"), 1, 2])
def test_an_interrupted_folder_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | int
) -> None:
    """A number is that of the rename at which the disk is full."""
    path = tmp_path / "folder"
    with whole_folder(path) as scratch:
        (scratch / "old").write_text("old")
    replace, calls = Path.replace, []

    def sometimes(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == error:
            raise FULL_DISK
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", sometimes)
    given = None if isinstance(error, int) else error
    raised: type[BaseException] = ColdstillError
    if given is not None and given is not FULL_DISK:
        raised = type(given)
    with pytest.raises(raised):
        half_made(path, given)
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]


def test_equal_values_give_equal_json_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "1.json", tmp_path / "2.json"
    value = {"a": {"é": "ü", "z": None}, "b": [1, 2.5]}
    write_json(one, {"b": [1, 2.5], "a": {"z": None, "é": "ü"}})
    write_json(other, value)
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().endswith(b"}\n")
    assert "ü" in one.read_text(encoding="utf-8")
    assert read_json(one) == value
    for wrong in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError), match="JSON"):
            write_json(one, wrong)
    assert read_json(one) == value
    assert names(tmp_path) == ["1.json", "2.json"]


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    assert refusal(read_json, path) == f"{path}: does not exist"
    for content in (b"", b"{", b"\xff\xfe", b'{"a": }', b"[" * 100_000, b"1" * 10_000):
        path.write_bytes(content)
        assert refusal(read_json, path).startswith(f"{path}: cannot be read as JSON")


def test_only_scratch_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH_PREFIX}1-file").write_text("x")
    (tmp_path / f"{SCRATCH_PREFIX}2-folder").mkdir()
    (tmp_path / f"{SCRATCH_PREFIX}2-folder" / "inner").write_text("x")
    (tmp_path / "kept").write_text(json.dumps(1))
    (tmp_path / ".hidden").write_text("x")
    remove_scratch(tmp_path)
    assert names(tmp_path) == [".hidden", "kept"]
    remove_scratch(tmp_path / "nowhere")


def make_files(folder: Path, contents: dict[str, str]) -> list[Path]:
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


def test_the_hash_of_files_depends_on_content_name_and_border_only(tmp_path: Path) -> None:
    contents = {"a": "1", "b": "2", "c": ""}
    here, there = make_files(tmp_path / "x", contents), make_files(tmp_path / "y", contents)
    assert files_sha256(here) == files_sha256(list(reversed(there)))
    variants = [contents, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    variants += [{"a": "2", "b": "1"}, {"a": "12", "b": ""}, {"a": "1"}, {}]
    found = {files_sha256(make_files(tmp_path / str(i), v)) for i, v in enumerate(variants)}
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
