"""`export.json`: what was exported, how it was checked, and what it costs to run."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from ...data.errors import ColdstillError
from ...data.files import file_sha256, json_bytes, read_json
from ..evaluation.speed import GenerationSpeed  # noqa: TC001 - for pydantic
from .checks import Fidelity  # noqa: TC001 - for pydantic
from .contract import RECORD, Limits

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 2
_PACKAGES = (
    "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "gguf", "llama_cpp_python",
    "torchao",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentIdentity:
    """The student that was exported."""

    name: str
    family: str
    parameters: int
    fingerprint: str
    """SHA-256 of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A passed comparison of an export with its student."""

    format: str
    checked_by: str
    """Name and version of the runtime."""
    checked_by_own_runtime: bool
    check: Fidelity
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What an export costs to run."""

    bytes: int
    """Size of its weight files."""
    dtype: str
    generation: tuple[GenerationSpeed, ...]
    """Speed for one text at a time; empty if not measured."""
    machine: str
    runtime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """One file of an export."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord(Check):
    """Content of `export.json`."""

    version: int
    student: StudentIdentity
    packages: dict[str, str]
    """Versions of the libraries."""
    heldout: str
    """Identity of the held-out store."""
    sample: dict[str, dict[str, Any]]
    """Evaluation of `student` and of `export` on the same sample of held-out documents."""
    costs: Costs
    notes: tuple[str, ...] = ()
    """Notes for the user, as sentences."""
    base: Check | None = None
    """Check of the export that this one was quantised from."""
    files: dict[str, FileIdentity]
    """All files of the export but the record, by relative path."""

    def write(self, folder: Path) -> ExportRecord:
        """Write the record of all files in the folder. Returns the record with these files."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {
            path.relative_to(folder).as_posix(): FileIdentity(
                bytes=path.stat().st_size, sha256=file_sha256(path)
            )
            for path in paths
            if path != folder / RECORD
        }
        record = replace(self, files=files)
        (folder / RECORD).write_bytes(json_bytes(asdict(record)))
        return record


_ADAPTER = TypeAdapter(ExportRecord)


def existing_export(folder: Path, student: StudentIdentity) -> ExportRecord | None:
    """Check what is already at the path of a student's export. None if there is nothing.

    Raises
        ColdstillError: it is an export of other weights, a damaged one, or not an export
    """
    if not folder.exists():
        return None
    if not (folder / RECORD).exists():
        raise ColdstillError(
            f"{folder}: not an export, for it has no {RECORD}; move it away, or name another "
            "folder with --output"
        )
    try:
        record = _ADAPTER.validate_python(read_json(folder / RECORD))
    except (ColdstillError, ValidationError) as error:
        raise _damaged(folder, RECORD) from error
    if record.student.fingerprint != student.fingerprint:
        raise _other_weights(folder, record.student, student)
    for name, written in record.files.items():
        path = folder / name
        # the size first, which takes no time
        whole = path.is_file() and path.stat().st_size == written.bytes
        if not whole or file_sha256(path) != written.sha256:
            raise _damaged(folder, name)
    return record


def _other_weights(folder: Path, found: StudentIdentity, ours: StudentIdentity) -> ColdstillError:
    theirs, mine = found.fingerprint[:12], ours.fingerprint[:12]
    if found.name != ours.name:
        return ColdstillError(
            f"{folder}: already has an export of student '{found.name}' (SHA-256 {theirs}, "
            f"'{ours.name}' is {mine}); name another folder with --output"
        )
    return ColdstillError(
        f"{folder}: written from other weights of student '{ours.name}' (SHA-256 {theirs}, its "
        f"weights now are {mine}); delete that folder to export it again, or name another folder "
        "with --output"
    )


def _damaged(folder: Path, name: str) -> ColdstillError:
    return ColdstillError(f"{folder}: damaged ({name}); delete that folder to export it again")


def package_versions() -> dict[str, str]:
    """Versions of the libraries that write and run exports, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
