from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import (
    SCRATCH_PREFIX,
    read_json,
    remove_scratch,
    whole_file,
    whole_folder,
    write_json,
)

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


def half_made(path: Path, error: BaseException) -> None:
    with whole_folder(path) as scratch:
        (scratch / "new").write_text("half")
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
    with pytest.raises(ColdstillError) as caught:
        half_written(path, FULL_DISK if owner is None else None)
    text = str(caught.value)
    assert text.startswith(f"{path}: the disk is full")
    assert "free some space" in text
    assert "\n" not in text
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


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ColdstillError) as caught:
        write_json(tmp_path / "file" / "value.json", 1)
    assert "cannot be written" in str(caught.value)
    with pytest.raises(ColdstillError, match="cannot be written"), whole_file(tmp_path / "new"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_other_errors_of_the_system_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), whole_file(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error")


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for content in ("first", "second"):
        with whole_folder(path) as scratch:
            (scratch / "inner").mkdir()
            (scratch / "inner" / content).write_text(content)
            assert not (path / "inner" / content).exists()
        assert names(path / "inner") == [content]
        assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt(), ValueError("x")])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "folder"
    with whole_folder(path) as scratch:
        (scratch / "old").write_text("old")
    expected = ColdstillError if error is FULL_DISK else type(error)
    with pytest.raises(expected):
        half_made(path, error)
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_folder_whose_rename_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    path = tmp_path / "folder"
    with whole_folder(path) as scratch:
        (scratch / "old").write_text("old")
    replace, calls = Path.replace, []

    def sometimes(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == nth:
            raise FULL_DISK
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", sometimes)
    with pytest.raises(ColdstillError, match="the disk is full"), whole_folder(path) as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]


def test_equal_values_give_equal_json_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "1.json", tmp_path / "2.json"
    write_json(one, {"b": [1, 2.5], "a": {"z": None, "é": "ü"}})
    write_json(other, {"a": {"é": "ü", "z": None}, "b": [1, 2.5]})
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().endswith(b"}\n")
    assert "ü" in one.read_text(encoding="utf-8")
    assert read_json(one) == {"a": {"é": "ü", "z": None}, "b": [1, 2.5]}


def test_a_value_that_is_not_json_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, value)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == 1
    assert names(tmp_path) == ["value.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"a": }', b"[" * 100_000, b"1" * 10_000],
    ids=["empty", "cut", "no text", "no value", "deep", "long number"],
)
def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(ColdstillError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}: not there"
    path.write_bytes(content)
    with pytest.raises(ColdstillError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as JSON")
    assert "\n" not in str(caught.value)


def test_only_scratch_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH_PREFIX}1-file").write_text("x")
    (tmp_path / f"{SCRATCH_PREFIX}2-folder").mkdir()
    (tmp_path / f"{SCRATCH_PREFIX}2-folder" / "inner").write_text("x")
    (tmp_path / "kept").write_text(json.dumps(1))
    (tmp_path / ".hidden").write_text("x")
    remove_scratch(tmp_path)
    assert names(tmp_path) == [".hidden", "kept"]
    remove_scratch(tmp_path / "nowhere")
