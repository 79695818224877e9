"""What stands where an export would go: nothing, the very export, or something that is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.fingerprint import file_sha256
from .job import RECORD

if TYPE_CHECKING:
    from pathlib import Path


def listed_files(folder: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of every file of an export but its record."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in paths
        if path != folder / RECORD
    }


def standing(folder: Path, student: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a student's export, whose files are all as they were written; None where
    nothing stands.

    student  as records have it: its name and its weights' fingerprint

    Raises
        ColdstillError: it is of other weights, damaged, or no export at all
    """
    if not folder.exists():
        return None
    if not (folder / RECORD).exists():
        raise ColdstillError(
            f"{folder}: no export, for it has no {RECORD}; move it away, or name another folder "
            "with --output"
        )
    record = _record(folder)
    _expect_of(folder, record["student"], student)
    for name, written in record["files"].items():
        path = folder / name
        # the size first: it is there at once
        if not path.is_file() or path.stat().st_size != written["bytes"]:
            raise _damaged(folder, name)
        if file_sha256(path) != written["sha256"]:
            raise _damaged(folder, name)
    return record


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: Any = read_json(folder / RECORD)
    except ColdstillError as error:
        raise _damaged(folder, RECORD) from error
    kinds = {"student": dict, "files": dict, "costs": dict}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in kinds.items()
    ):
        raise _damaged(folder, RECORD)
    return record


def _expect_of(folder: Path, found: dict[str, Any], student: dict[str, Any]) -> None:
    if found.get("fingerprint") == student["fingerprint"]:
        return
    theirs, ours = (str(each.get("fingerprint"))[:12] for each in (found, student))
    if found.get("name") != student["name"]:
        raise ColdstillError(
            f"{folder}: an export of student '{found.get('name')}' stands there (SHA-256 {theirs}, "
            f"'{student['name']}' is {ours}); name another folder with --output"
        )
    raise ColdstillError(
        f"{folder}: written from other weights of a student '{student['name']}' (SHA-256 {theirs}, "
        f"this one's are {ours}); delete that folder to write it anew, or name another with "
        "--output"
    )


def _damaged(folder: Path, name: str) -> ColdstillError:
    return ColdstillError(f"{folder}: damaged ({name}); delete that folder to write it anew")
