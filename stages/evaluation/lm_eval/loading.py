"""Loads task files and their data into lm-eval, which then has these tasks and no others.

lm-eval and its libraries are kept off the network and off the screen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .task_files import TaskFile, Unit

_LOGGERS = ("lm_eval", "datasets", "evaluate")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Switch off the hub in this process and in those that a task starts.

    Environment variables alone have no effect here: the libraries read them when imported.
    """
    import datasets
    import evaluate
    import huggingface_hub
    from accelerate.utils import patch_environment

    switches: list[tuple[Any, str]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (evaluate.config, "HF_EVALUATE_OFFLINE"),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch_environment(**{name: "1" for _, name in switches}))
        for owner, name in switches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, True)
        yield


class _Warnings(logging.Handler):
    """Collects the first line of every warning once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = next(iter(record.getMessage().strip().splitlines()), "")[:200]
        if line and line not in self.lines:
            self.lines.append(line)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Suppress the libraries' progress bars, prints and logs. Gives the list of their warnings."""
    handler, nowhere = _Warnings(), io.StringIO()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            for logger in loggers:
                logger.handlers, logger.propagate = [handler], False
            yield handler.lines
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate


def expect_lm_eval() -> None:
    """Check that lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ColdstillError("evaluate: --tasks needs lm-eval: pip install 'coldstill[harness]'")


def load_units(
    tasks: Iterable[TaskFile], units: Iterable[Unit], *, download: bool = False
) -> dict[str, Any]:
    """Load the data of each unit, and run the Python code that its files name.

    tasks     all task files: a unit can refer to its members by name
    download  tasks may fetch data and metrics; otherwise the caller has switched the hub off

    Returns lm-eval's own `TaskDict` for each unit, by the unit's name.

    Raises
        ColdstillError: lm-eval lacks a metric, data are not on this machine, or lm-eval
            cannot load a task
    """
    from lm_eval.tasks import TaskManager

    shows_downloads = download and sys.stderr.isatty()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.nullcontext() if shows_downloads else quiet(),
    ):
        # lm-eval indexes folders, so the given files are included from files in one
        for index, task in enumerate(tasks):
            text = json.dumps({"include": str(task.path.resolve()), **task.located})
            Path(folder, f"{index:06d}.yaml").write_text(text, encoding="utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)
        return {unit.name: _load(manager, unit, download=download) for unit in units}


def _load(manager: Any, unit: Unit, *, download: bool) -> Any:
    for part in unit.parts:
        _expect_metrics(part, download=download)
        # the switched-off hub does not stop requests to other servers
        urls = [name for name in part.remote if "://" in name and not name.startswith("hf://")]
        if urls and not download:
            raise _not_here(part, urls[0])
    try:
        loaded = manager.load([unit.name])
    except Exception as error:  # lm-eval, datasets and a task's code raise any class
        raise _cannot_load(unit, error, download=download) from error
    for name, task in loaded["tasks"].items():
        where = f"{unit.parts[0].path}: task '{name}'"
        if getattr(task, "UNSAFE_CODE", False):
            raise ColdstillError(
                f"{where}: its 'unsafe_code' would execute the model's output; not supported"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ColdstillError(f"{where}: has images or audio, and students read only text")
    return loaded


def _expect_metrics(task: TaskFile, *, download: bool) -> None:
    """Check that lm-eval has all metrics: it loads a task without them, and fails at its end."""
    from lm_eval.api.registry import get_aggregation, get_metric

    own_metrics = task.settings.get("process_results") is not None
    for entry in [] if task.is_group else task.listed("metric_list"):
        if not isinstance(entry, dict) or "metric" not in entry:
            raise ColdstillError(f"{task.where}: expected a 'metric' in each of its 'metric_list'")
        name, aggregation = entry["metric"], entry.get("aggregation")
        on_hub = entry.get("hf_evaluate") is True
        if isinstance(name, str) and not own_metrics and get_metric(name, on_hub) is None:
            searched = "lm-eval or on the hub" if download else "lm-eval"
            hint = "" if download else "; --download searches the hub too"
            raise ColdstillError(f"{task.where}: no metric {name!r} in {searched}{hint}")
        if isinstance(aggregation, str) and get_aggregation(aggregation) is None:
            raise ColdstillError(f"{task.where}: no aggregation {aggregation!r} in lm-eval")


def _cannot_load(unit: Unit, error: Exception, *, download: bool) -> ColdstillError:
    text = class_and_line(error)
    remote = [(part, name) for part in unit.parts for name in part.remote]
    if not remote or not (isinstance(error, OSError) or "cache" in text):
        return ColdstillError(f"{unit.parts[0].path}: task '{unit.name}': {text}")
    task, name = next((pair for pair in remote if pair[1] in text), remote[0])
    if not download:
        return _not_here(task, name)
    return ColdstillError(f"{task.where} cannot fetch the data set {name!r}: {text}")


def _not_here(task: TaskFile, name: str) -> ColdstillError:
    return ColdstillError(
        f"{task.where} reads the data set {name!r}, which is not on this machine; --download "
        "fetches it"
    )


def class_and_line(error: Exception) -> str:
    """Class and first line of an exception of another library, at most 300 characters."""
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # its text is only that an error occurred
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
