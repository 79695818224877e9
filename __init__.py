"""coldstill: offline distillation of large language models.

The public interface: `open_store(path)` gives a store that has a length, reads any sequences with
their targets (`read`) and yields batches (`batches`). Everything it returns is numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .data.errors import ColdstillError
from .data.store.reader import StoreReader, open_store

__version__ = "0.1.0"

__all__ = ["ColdstillError", "StoreReader", "open_store"]

_STEPS = {
    "compare", "evaluate", "export", "prune_students", "run", "teacher_logits", "train_students",
    "train_teacher",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _STEPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".pipeline.steps.interface", __name__), name)
