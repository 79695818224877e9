"""What a running stage says; the pipeline draws it, tests assert on it.

A stage takes a `Reporter` and calls it. (An iterator of reports would read more nicely, but the
training loop belongs to `transformers.Trainer`, which calls back: turning that inside out needs a
second thread, and then Ctrl-C and the device context live in the wrong one.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One step forward, the beginning of something, or one sentence."""

    stage: str
    """The command's name, and what of it: `teacher-logits train`."""
    doing: str = ""
    """What begins now, where nothing is counted: `load the teacher`. Within a stage that counts it
    is what comes between two steps. A report has either this, a note or counts."""
    part: str = ""
    """Which pass of a stage this is, where it makes several: `pass 2 of 6, without layer 3`."""
    done: int = 0
    total: int = 0
    """Both in `unit`; a total of 0 means that it is not known. A stage that counts reports once
    before its first step, so that its beginning is told."""
    step: int = 0
    """How much of `done` is new since the last report: what a resumed bar starts from."""
    unit: str = "tokens"
    note: str = ""
    """A sentence for the user."""
    warning: bool = False
    """Whether the note tells of something that will hurt."""
    figures: dict[str, float] = field(default_factory=dict)
    """Latest measurements, shown beside the bar."""


Reporter = Callable[[Report], None]


def silent(report: Report) -> None:
    """A reporter for those who do not care."""
