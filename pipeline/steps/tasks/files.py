"""Task files: which tasks and groups they hold, and every file that decides what a task asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ....data.fingerprint import file_sha256
from .located import TaskData, locate
from .yaml_file import YamlFile, read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_IGNORED = ("__pycache__", ".ipynb_checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """A file that holds a task, or a group of tasks."""

    name: str
    path: Path
    settings: dict[str, Any]
    files: tuple[Path, ...]
    """All that decide what it asks: this one, those that it includes, functions, data."""
    data: TaskData
    is_group: bool

    @property
    def where(self) -> str:
        """How an error begins."""
        return f"{self.path}: {'group' if self.is_group else 'task'} '{self.name}'"

    @property
    def metrics(self) -> tuple[tuple[str, bool], ...]:
        """Metrics that lm-eval must know: by name, and whether `evaluate` has them."""
        if self.is_group or self.settings.get("process_results") is not None:
            return ()  # its own function makes them
        return tuple(
            (entry["metric"], entry.get("hf_evaluate") is True)
            for entry in self._metric_list
            if isinstance(entry["metric"], str)
        )

    @property
    def aggregations(self) -> tuple[str, ...]:
        """The same of aggregations."""
        named = [entry.get("aggregation") for entry in self._metric_list]
        return () if self.is_group else tuple(n for n in named if isinstance(n, str))

    @property
    def _metric_list(self) -> list[dict[str, Any]]:
        listed = self.settings.get("metric_list") or []
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and "metric" in entry for entry in listed
        ):
            raise ColdstillError(f"{self.where}: expected a 'metric' in each of its 'metric_list'")
        return listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is run in one go: a task, or a group with all that it holds."""

    task: TaskFile
    parts: tuple[TaskFile, ...]
    """What a group holds, and what that holds."""

    @property
    def name(self) -> str:
        """The task's or the group's."""
        return self.task.name

    @property
    def distant(self) -> tuple[str, ...]:
        """Data that are not files."""
        return tuple(name for part in (self.task, *self.parts) for name in part.data.distant)

    def fingerprints(self) -> dict[str, str]:
        """The SHA-256 of every file that decides what is asked, by its path from the task file's
        folder: where both lie is no matter."""
        files = {file for part in (self.task, *self.parts) for file in part.files}
        base = self.task.path.resolve().parent
        named = {Path(os.path.relpath(f.resolve(), base)).as_posix(): f for f in files}
        return {name: file_sha256(named[name]) for name in sorted(named)}


def read_tasks(paths: Sequence[Path]) -> dict[str, TaskFile]:
    """All tasks and groups of some files and folders, by name.

    Raises
        ColdstillError: a path is not there, a file is no YAML or holds no task, a folder holds
            none, two tasks have one name, a task's data files are not there
    """
    found: dict[str, TaskFile] = {}
    for path in paths:
        if not path.exists():
            raise ColdstillError(f"--tasks: {path}: no such file or folder")
        before = len(found)
        for file in _yaml_files(path) if path.is_dir() else [path]:
            if any(file.resolve() == other.path.resolve() for other in found.values()):
                before -= 1  # given twice
                continue
            task = _task(file, read_yaml(file), named=not path.is_dir())
            if task is None:
                continue
            if task.name in found:
                raise ColdstillError(
                    f"{task.path}: a second task '{task.name}'; the first is in "
                    f"{found[task.name].path}"
                )
            found[task.name] = task
        if path.is_dir() and len(found) == before:
            raise ColdstillError(f"--tasks: {path}: no task in it: no *.yaml file has 'task'")
    return found


def units(tasks: Mapping[str, TaskFile]) -> list[Unit]:
    """What is to be run: groups, and tasks that no group holds.

    Raises
        ColdstillError: a group names what no file holds, or groups hold one another
    """
    held = {name for task in tasks.values() for name in _held(task, tasks)}
    found = [
        Unit(task=task, parts=tuple(_parts(task, tasks, (name,))))
        for name, task in tasks.items()
        if name not in held
    ]
    reached = {part.name for unit in found for part in (unit.task, *unit.parts)}
    for name, task in tasks.items():
        if name not in reached:
            raise ColdstillError(f"{task.where}: groups that hold one another")
    return found


def _parts(
    task: TaskFile, tasks: Mapping[str, TaskFile], above: tuple[str, ...]
) -> Iterator[TaskFile]:
    for name in _held(task, tasks):
        if name in above:
            raise ColdstillError(f"{task.where}: groups that hold one another")
        yield tasks[name]
        yield from _parts(tasks[name], tasks, (*above, name))


def _held(task: TaskFile, tasks: Mapping[str, TaskFile]) -> list[str]:
    """What a group holds directly; a tag stands for every task that bears it."""
    if not task.is_group:
        return []
    listed = task.settings.get("task") or []
    if not isinstance(listed, list):
        raise ColdstillError(f"{task.where}: expected a list of names for its 'task'")
    names: list[str] = []
    for entry in listed:
        name = (entry.get("task") or entry.get("group")) if isinstance(entry, dict) else entry
        tagged = [other.name for other in tasks.values() if name in _tags(other)]
        if name in tasks:
            names.append(str(name))
        elif tagged:
            names += tagged
        elif not (isinstance(entry, dict) and _is_complete(entry)):
            raise ColdstillError(
                f"{task.where}: holds '{name}', which is in none of the files given"
            )
    return names


def _is_complete(entry: dict[str, Any]) -> bool:
    """Whether a group's entry is a task by itself, or a group."""
    return any(key in entry for key in ("dataset_path", "custom_dataset", "class")) or isinstance(
        entry.get("task"), list
    )


def _tags(task: TaskFile) -> list[Any]:
    tags = task.settings.get("tag") or []
    return tags if isinstance(tags, list) else [tags]


def _yaml_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*.yaml"))
        if path.is_file() and not set(path.parts) & set(_IGNORED)
    ]


def _task(path: Path, content: YamlFile | None, *, named: bool) -> TaskFile | None:
    """The task of a file. Folders also hold files that tasks include: these have no name."""
    settings = {} if content is None else content.settings
    is_group = "group" in settings and "class" not in settings
    name = settings.get("group" if is_group else "task")
    if content is None or (name is None and "class" not in settings):
        if named:
            raise ColdstillError(f"{path}: holds no task: it has neither 'task' nor 'group'")
        return None
    if not isinstance(name, str):
        raise ColdstillError(f"{path}: expected a name for its 'task', got {name!r}")
    where = f"{path}: task '{name}'"
    folders = list(dict.fromkeys(file.parent for file in content.files))
    data = TaskData() if is_group else locate(settings, folders, where)
    return TaskFile(
        name=name,
        path=path,
        settings=settings,
        files=(*content.files, *data.files),
        data=data,
        is_group=is_group,
    )
