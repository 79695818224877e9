"""Where a task's data are: files here, or something that would have to be fetched."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from .yaml_file import FunctionName

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORMATS = (
    "arrow", "audiofolder", "csv", "hdf5", "imagefolder", "json", "pandas", "parquet", "sql",
    "text", "videofolder", "webdataset", "xml",
)  # fmt: skip
"""Names for `dataset_path` that stand for a format of the task's own files (`datasets` 4 and 5)."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """What one task reads."""

    located: dict[str, Any] = field(default_factory=dict)
    """Keys of the task in which paths are whole, for those that have some."""
    files: tuple[Path, ...] = ()
    distant: tuple[str, ...] = ()
    """Names on a hub, addresses."""


def locate(settings: dict[str, Any], folders: Sequence[Path], where: str) -> TaskData:
    """The data of a task. A relative path is looked for in `folders`, those of its file and of what
    that includes; then as lm-eval does, where the command is run.

    Raises
        ColdstillError: there are none, or a file is not there
    """
    named = settings.get("dataset_path")
    kwargs = settings.get("dataset_kwargs") or {}
    if named is None:
        if "class" in settings or isinstance(settings.get("custom_dataset"), FunctionName):
            return TaskData()  # its own code finds them
        raise ColdstillError(f"{where}: names no data; give it 'dataset_path'")
    if not isinstance(named, str) or not isinstance(kwargs, dict):
        wrong = "dataset_path" if isinstance(kwargs, dict) else "dataset_kwargs"
        raise ColdstillError(f"{where}: cannot read its {wrong!r}")
    if named in _FORMATS:
        return _own_files(named, kwargs, folders, where)
    for beside in _candidates(named, folders):
        if beside.is_dir():
            return TaskData({"dataset_path": str(beside)}, _all_files(beside))
    if named.startswith((".", "/", "~")):
        raise ColdstillError(f"{where}: its dataset_path {named} is no folder")
    return TaskData(distant=(named,))


def _own_files(named: str, kwargs: dict[str, Any], folders: Sequence[Path], where: str) -> TaskData:
    changed = dict(kwargs)
    files: list[Path] = []
    distant: list[str] = []
    if (within := kwargs.get("data_dir")) is not None:
        found = next((p for p in _candidates(str(within), folders) if p.is_dir()), None)
        if found is None:
            raise ColdstillError(f"{where}: its data_dir {within} is no folder")
        changed["data_dir"] = str(found)
        files += _all_files(found)
    elif (given := kwargs.get("data_files")) is not None:

        def whole(value: Any) -> Any:
            if isinstance(value, dict):
                return {split: whole(inner) for split, inner in value.items()}
            if isinstance(value, list):
                return [whole(inner) for inner in value]
            if "://" in str(value):
                distant.append(str(value))
                return value
            for pattern in _candidates(str(value), folders):
                if matching := _matching(pattern):
                    if not any(path.stat().st_size for path in matching):
                        raise ColdstillError(f"{where}: its data file {value} is empty")
                    files.extend(matching)
                    return str(pattern)
            raise ColdstillError(
                f"{where}: its data file {value} is neither beside it nor in the folder where the "
                "command is run"
            )

        changed["data_files"] = whole(given)
    else:
        raise ColdstillError(
            f"{where}: reads {named!r} files, but 'dataset_kwargs' names no data_files"
        )
    return TaskData({"dataset_kwargs": changed}, tuple(files), tuple(distant))


def _candidates(name: str, folders: Sequence[Path]) -> list[Path]:
    path = Path(name).expanduser()
    return [*((folder / path).absolute() for folder in folders), path.absolute()]


def _matching(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    found = sorted(glob.glob(str(pattern), recursive=True))
    return [path for path in map(Path, found) if path.is_file()]


def _all_files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file())
