"""Progress reports of a running stage; the pipeline shows them, and tests check them.

A stage gets a `Reporter` and calls it. (Stages are not iterators of reports, since the training
loop belongs to `transformers.Trainer`, which uses callbacks: an iterator would need a second thread
for training, and Ctrl-C and the device context would be in the wrong thread.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Progress of a counted stage, the start of a step without counts, or a note."""

    stage: str
    """Name of the command and of its part: `teacher-logits train`."""
    doing: str = ""
    """Step that begins now and is not counted: `load the teacher`. A report has either this, a
    note, or counts."""
    part: str = ""
    """Current pass of a stage that has several: `pass 2 of 6, without layer 3`."""
    done: int = 0
    """Finished amount in `unit`. A stage also reports once before its first step."""
    total: int = 0
    """Whole amount in `unit`; 0 if it is not known."""
    step: int = 0
    """Part of `done` that is new since the last report; a resumed bar starts without it."""
    unit: str = "tokens"
    note: str = ""
    """A sentence for the user."""
    warning: bool = False
    """Whether the note is a warning."""
    figures: dict[str, float] = field(default_factory=dict)
    """Latest measurements, shown next to the bar."""


Reporter = Callable[[Report], None]


def silent(report: Report) -> None:
    """Ignore a report."""
