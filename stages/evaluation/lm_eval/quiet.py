"""Keeps lm-eval and its libraries off the network and off the screen."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

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
