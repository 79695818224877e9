"""What lm-eval and its libraries do besides: reach for a hub, print, draw bars, log."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOREIGN = ("lm_eval", "datasets", "evaluate")
"""Whose logs are not the user's."""
_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Switch the hub off. The environment alone would not do: its libraries have read it when they
    were imported."""
    import datasets
    import evaluate
    import huggingface_hub

    switches = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (evaluate.config, "HF_EVALUATE_OFFLINE"),
    )
    before = [getattr(owner, name) for owner, name in switches]
    with environment(**dict.fromkeys(_SWITCHES, "1")):  # for processes that a task may begin
        try:
            for owner, name in switches:
                setattr(owner, name, True)
            yield
        finally:
            for (owner, name), value in zip(switches, before, strict=True):
                setattr(owner, name, value)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of this process, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Heard(logging.Handler):
    """Keeps the first line of every warning, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = next(iter(record.getMessage().strip().splitlines()), "")[:200]
        if line and line not in self.lines:
            self.lines.append(line)


@contextlib.contextmanager
def hushed() -> Iterator[list[str]]:
    """Keep bars, prints and logs of others off the screen; what they warned of is in the list."""
    heard, nowhere = _Heard(), io.StringIO()
    loggers = [logging.getLogger(name) for name in _FOREIGN]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            for logger in loggers:
                logger.handlers, logger.propagate = [heard], False
            yield heard.lines
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
