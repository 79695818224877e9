"""Tasks and their data, made known to lm-eval. It would find tasks in its own package and fetch
their data from a hub; here it knows the given files, and the hub is off unless asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from .quiet import hushed, offline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """A task or a group of tasks, as its file describes it."""

    name: str
    path: Path
    """The YAML file."""
    located: Mapping[str, Any]
    """What is said in place of the file's own words: where its data lie."""
    distant: tuple[str, ...] = ()
    """Data that are no files of this machine: names on a hub, addresses."""
    metrics: tuple[tuple[str, bool], ...] = ()
    """Names of its metrics, and whether each is of the `evaluate` package."""
    aggregations: tuple[str, ...] = ()
    """How they become one number."""


def expect_harness() -> None:
    """Refuse at once what needs a package that is not here.

    Raises
        ColdstillError: lm-eval is not installed
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ColdstillError("evaluate: --tasks needs lm-eval: pip install 'coldstill[harness]'")


@contextlib.contextmanager
def harness(sources: Sequence[TaskSource], *, download: bool = False) -> Iterator[Harness]:
    """lm-eval with these tasks; the hub stays switched off for as long as it is open.

    download  let tasks fetch data and metrics that are not on this machine

    Raises
        ColdstillError: lm-eval is not installed
    """
    expect_harness()
    with (
        contextlib.nullcontext() if download else offline(),
        tempfile.TemporaryDirectory() as folder,
    ):
        yield Harness(sources, Path(folder), download=download)


class Harness:
    """lm-eval, and the tasks that it knows."""

    def __init__(self, sources: Sequence[TaskSource], folder: Path, *, download: bool) -> None:
        """Make the sources known by an empty folder. No data are read yet."""
        from lm_eval.tasks import TaskManager

        # It indexes folders. One of files that include those that were given knows exactly these.
        for index, source in enumerate(sources):
            text = json.dumps({"include": str(source.path.resolve()), **source.located})
            (folder / f"{index:06d}.yaml").write_text(text, encoding="utf-8")
        with hushed():
            self._manager = TaskManager(include_path=str(folder), include_defaults=False)
        self._sources = {source.name: source for source in sources}
        self._download = download

    def load(self, name: str, parts: Sequence[str] = ()) -> Any:
        """What lm-eval makes of a task and its data, or of a group and those of its `parts`.

        Raises
            ColdstillError: an unknown metric, data that are not here, whatever lm-eval cannot use
        """
        sources = [self._sources[part] for part in (name, *parts)]
        watched = self._download and sys.stderr.isatty()  # a download may take long
        with contextlib.nullcontext() if watched else hushed():
            for source in sources:
                self._expect_metrics(source)
            try:
                loaded = self._manager.load([name])
            except Exception as error:  # of lm-eval, of datasets, of a task's own code
                raise self._unloadable(sources, error) from error
        for task, made in loaded["tasks"].items():
            if wrong := _beyond_us(made):
                raise ColdstillError(f"{sources[0].path}: task '{task}': {wrong}")
        return loaded

    def _expect_metrics(self, source: TaskSource) -> None:
        """Refuse what lm-eval would go on with, to stumble over later."""
        from lm_eval.api.registry import get_aggregation, get_metric

        where = f"{source.path}: task '{source.name}'"
        for name, of_evaluate in source.metrics:
            if get_metric(name, of_evaluate) is None:
                searched = "lm-eval or on the hub" if self._download else "lm-eval"
                hint = "" if self._download else "; --download looks for it on the hub too"
                raise ColdstillError(f"{where}: no metric {name!r} in {searched}{hint}")
        for name in source.aggregations:
            if get_aggregation(name) is None:
                raise ColdstillError(f"{where}: no aggregation {name!r} in lm-eval")

    def _unloadable(self, sources: Sequence[TaskSource], error: Exception) -> ColdstillError:
        text = first_line(error)
        distant = [(source, name) for source in sources for name in source.distant]
        is_away = isinstance(error, OSError) or "cache" in text
        if not (distant and is_away):
            return ColdstillError(f"{sources[0].path}: task '{sources[0].name}': {text}")
        source, name = next((pair for pair in distant if pair[1] in text), distant[0])
        reads = f"{source.path}: task '{source.name}' reads the data set {name!r}, which"
        if self._download:
            return ColdstillError(f"{reads} cannot be fetched: {text}")
        return ColdstillError(f"{reads} is not on this machine; with --download it is fetched")


def _beyond_us(task: Any) -> str | None:
    """What a task asks for that no student is run with."""
    if getattr(task, "UNSAFE_CODE", False):
        return "its 'unsafe_code' runs what the model writes, which is not done here"
    if getattr(task, "MULTIMODAL", False):
        return "it shows pictures or sounds; students read text"
    return None


def first_line(error: Exception) -> str:
    """What somebody else's error says, as one line."""
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it says itself no more than that there was one
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text[:300]
