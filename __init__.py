"""coldstill: offline distillation of large language models.

Reading and writing stores loads no torch:

- `open_store(path)` opens a store: its length, any sequences with their targets, and batches.
- `StoreWriter` writes a store from targets of any origin.

Training with your own loop needs torch, which is imported when one of these names is first used:

- `StoreDataset(store)` is a map-style torch dataset; `collate` makes a `Batch` of its items.
- `losses.loss("kl")(student_logits, batch.targets)` is one of the objectives.

The steps of a run as functions: `run`, `train_teacher`, `teacher_logits`, `prune_students`,
`train_students`, `evaluate`, `compare`, `export`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.errors import ColdstillError
from .data.schema import Capture
from .data.store.reader import StoreReader, open_store
from .data.store_writer import StoreWriter

if TYPE_CHECKING:
    from .pipeline.steps.interface import (
        compare,
        evaluate,
        export,
        prune_students,
        run,
        teacher_logits,
        train_students,
        train_teacher,
    )
    from .stages.targets import losses
    from .stages.training.batch import Batch, collate
    from .stages.training.feed import StoreDataset

__version__ = "0.2.0"

__all__ = [
    "Batch", "Capture", "ColdstillError", "StoreDataset", "StoreReader", "StoreWriter", "collate",
    "compare", "evaluate", "export", "losses", "open_store", "prune_students", "run",
    "teacher_logits", "train_students", "train_teacher",
]  # fmt: skip

_STEPS = ".pipeline.steps.interface"
_LAZY = {
    "Batch": ".stages.training.batch",
    "StoreDataset": ".stages.training.feed",
    "collate": ".stages.training.batch",
    "losses": ".stages.targets",
    **dict.fromkeys(
        (
            "compare", "evaluate", "export", "prune_students", "run", "teacher_logits",
            "train_students", "train_teacher",
        ),
        _STEPS,
    ),
}  # fmt: skip
"""The module of each name that is imported when it is first used: these need torch or a recipe."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{_LAZY[name]}.{name}" if name == "losses" else _LAZY[name], __name__)
    value = module if name == "losses" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
