"""Reads lm-eval task files: tasks, groups, the files that decide what is asked, and their hashes.

lm-eval's own loader reads the YAML, so a file means here what it means when the task runs. Reading
executes no code that a file names and fetches no data.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ....data.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """A YAML file that defines one task or one group of tasks."""

    name: str
    path: Path
    is_group: bool
    settings: dict[str, Any]
    """Content of the file merged with its includes. A function is the text `FOLDER/module.name`."""
    located: dict[str, Any]
    """Settings that replace the file's own: paths of local data are absolute in them."""
    files: tuple[Path, ...]
    """Every file that decides what the task asks: YAML files, Python modules, data."""
    remote: tuple[str, ...]
    """Data sets on a hub and URLs."""

    @property
    def where(self) -> str:
        return f"{self.path}: {'group' if self.is_group else 'task'} '{self.name}'"

    def listed(self, key: str) -> list[Any]:
        """A setting that is a list or a single entry."""
        value = self.settings.get(key) or []
        return value if isinstance(value, list) else [value]


@dataclass(frozen=True, slots=True)
class Unit:
    """A task, or a group with all its members: what runs in one go and has one record."""

    parts: tuple[TaskFile, ...]
    """The task itself, or the group and then its tasks and groups at any depth."""

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def remote(self) -> tuple[str, ...]:
        """Data sets on a hub and URLs that the unit reads."""
        return tuple(name for part in self.parts for name in part.remote)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every file that decides what is asked.

        Keys are paths relative to the task file's folder, so a moved task keeps its record.
        """
        base = self.parts[0].path.resolve().parent
        files = {file.resolve() for part in self.parts for file in part.files}
        named = {Path(os.path.relpath(file, base)).as_posix(): file for file in files}
        return {name: file_sha256(named[name]) for name in sorted(named)}


def read_tasks(paths: Sequence[Path]) -> dict[str, TaskFile]:
    """All tasks and groups of some files and folders, by name.

    Raises
        ColdstillError: a path does not exist, a file is not valid YAML or defines no task, a folder
            has no task, two tasks have the same name, or a data file does not exist
    """
    tasks: dict[str, TaskFile] = {}
    for path in paths:
        if not path.exists():
            raise ColdstillError(f"--tasks: {path}: no such file or folder")
        files = [path]
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*.yaml")) if not _IGNORED & set(f.parts)]
        found = [task for file in files if (task := _read(file, required=file == path))]
        if not found:
            raise ColdstillError(f"--tasks: {path}: no task in it: no *.yaml file has 'task'")
        for task in found:
            first = tasks.setdefault(task.name, task)
            if first.path.resolve() != task.path.resolve():
                raise ColdstillError(
                    f"{task.path}: a second task '{task.name}'; the first is in {first.path}"
                )
    return tasks


def units(tasks: Mapping[str, TaskFile]) -> list[Unit]:
    """All tasks and groups that are not a member of another group.

    Raises
        ColdstillError: a group names a task that is not in the files, or groups contain each
            other
    """
    members = {name: _members(task, tasks) for name, task in tasks.items()}
    try:
        TopologicalSorter(members).prepare()
    except CycleError as error:
        cycle = error.args[1]
        raise ColdstillError(
            f"{tasks[cycle[0]].where}: groups contain each other ({' in '.join(cycle)})"
        ) from error

    def parts(name: str) -> Iterator[TaskFile]:
        yield tasks[name]
        for member in members[name]:
            yield from parts(member)

    inner = {member for names in members.values() for member in names}
    return [Unit(tuple(parts(name))) for name in tasks if name not in inner]


def _members(task: TaskFile, tasks: Mapping[str, TaskFile]) -> list[str]:
    """Names of a group's direct members. A tag stands for every task that has it."""
    listed = (task.settings.get("task") or []) if task.is_group else []
    if not isinstance(listed, list):
        raise ColdstillError(f"{task.where}: expected a list of names for its 'task'")
    names: list[str] = []
    for entry in listed:
        inline = entry if isinstance(entry, dict) else {"task": entry}
        name = inline.get("task") or inline.get("group")
        if isinstance(name, str) and name in tasks:
            names.append(name)
        elif tagged := [other.name for other in tasks.values() if name in other.listed("tag")]:
            names += tagged
        elif not (
            inline.keys() & {"dataset_path", "custom_dataset", "class"} or isinstance(name, list)
        ):
            raise ColdstillError(f"{task.where}: '{name}' is not in any of the given files")
    return names


def _read(path: Path, *, required: bool) -> TaskFile | None:
    """The task of a file. None for a file that other files include, unless it is `required`."""
    settings, files = _settings(path)
    is_group = "group" in settings and "class" not in settings
    name = settings.get("group" if is_group else "task")
    if name is None and "class" not in settings:
        if required:
            raise ColdstillError(f"{path}: has no task: neither 'task' nor 'group'")
        return None
    if not isinstance(name, str):
        raise ColdstillError(f"{path}: expected a name for its 'task', got {name!r}")
    folders = [path.parent, *(file.parent for file in files), Path()]
    data = _Data(where=f"{path}: task '{name}'", folders=tuple(dict.fromkeys(folders)))
    located = {} if is_group else data.locate(settings)
    return TaskFile(
        name=name,
        path=path,
        is_group=is_group,
        settings=settings,
        located=located,
        files=(*files, *data.files),
        remote=tuple(data.remote),
    )


def _settings(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """Merged content of a YAML file and its includes, and the files that it consists of.

    Those are the YAML files and the Python modules of its functions that lie beside them.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    read: set[Path] = set()
    try:
        settings = load_yaml(path, resolve_func=False, _seen=read)
    except Exception as error:  # PyYAML and lm-eval raise any class
        reason = " ".join(str(error).split())[:300]
        raise ColdstillError(f"{path}: not a readable task file: {reason}") from error
    return settings, sorted(read | set(_modules(settings)))


def _modules(value: Any) -> Iterator[Path]:
    """Files of the functions that a setting names, as `FOLDER/package.module.function`."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _modules(inner)
    elif isinstance(value, str) and os.path.isabs(value):
        folder, name = os.path.split(value)
        file = os.path.join(folder, f"{name.rpartition('.')[0].replace('.', '/')}.py")
        if os.path.isfile(file):
            yield Path(file)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """Finds the data of one task."""

    where: str
    folders: tuple[Path, ...]
    """Where relative paths are searched: folders of the task's YAML files, the current folder."""
    files: list[Path] = field(default_factory=list)
    """Local data files found so far."""
    remote: list[str] = field(default_factory=list)
    """Data sets on a hub and URLs found so far."""

    def locate(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings in which paths of local data are absolute."""
        from datasets.data_files import sanitize_patterns
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

        changed: dict[str, Any]
        path, options = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
        if path is None and settings.keys() & {"class", "custom_dataset"}:
            return {}  # the task's own code finds its data
        if path is None:
            raise ColdstillError(f"{self.where}: has no data; set 'dataset_path'")
        if not isinstance(path, str) or not isinstance(options, dict):
            wrong = "dataset_path" if isinstance(options, dict) else "dataset_kwargs"
            raise ColdstillError(f"{self.where}: cannot read its {wrong!r}")
        if path not in FORMATS:
            if path.startswith((".", "/", "~")) or any(f.is_dir() for f in self._candidates(path)):
                return {"dataset_path": self._found("dataset_path", path)}
            self.remote.append(path)
            return {}
        if (folder := options.get("data_dir")) is not None:
            changed = {"data_dir": self._found("data_dir", str(folder))}
        elif (given := options.get("data_files")) is not None:
            try:
                splits = sanitize_patterns(given)
            except (TypeError, ValueError) as error:
                raise ColdstillError(f"{self.where}: cannot read its 'data_files'") from error
            found = {s: [self._found("data file", str(n)) for n in ns] for s, ns in splits.items()}
            changed = {"data_files": found}
        else:
            raise ColdstillError(
                f"{self.where}: reads {path!r} files, but 'dataset_kwargs' has no 'data_files'"
            )
        return {"dataset_kwargs": {**options, **changed}}

    def _candidates(self, name: str) -> list[Path]:
        return [(folder / Path(name).expanduser()).absolute() for folder in self.folders]

    def _found(self, kind: str, name: str) -> str:
        """Absolute path of a local file, folder or pattern. A URL is returned unchanged."""
        if "://" in name:
            self.remote.append(name)
            return name
        for path in self._candidates(name):
            if path.is_dir():
                names = list(path.rglob("*"))
            else:
                names = [path, *map(Path, glob.glob(str(path), recursive=True))]
            files = [each for each in names if each.is_file()]
            if files and not any(each.stat().st_size for each in files):
                raise ColdstillError(f"{self.where}: its {kind} {name} is empty")
            if files:
                self.files.extend(files)
                return str(path)
        raise ColdstillError(
            f"{self.where}: its {kind} {name} is neither beside it nor in the current folder"
        )
