"""Checks an export: the difference from its student on held-out text, its speed and its memory.

Whole next-token distributions are compared at every position. The export runs twice on a document:
in one full pass, and token by token with its cache.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import ColdstillError
from ..evaluate import Sums, add_positions
from ..evaluation.quality import Calibration
from ..evaluation.speed import generation_speed, weights_bytes
from ..models.device import PeakMemory, give_back_freed_memory
from .reference import TorchRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ..evaluation.speed import GenerationSpeed, Passage
    from .contract import Limits, Runtime
    from .reference import HeldoutDocument

_STEPS = 16
"""Number of tokens that are fed one by one."""
_ROWS = 64
"""Positions that are compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Difference between an export and its student. Log-probabilities are natural logarithms."""

    documents: int
    positions: int
    """Positions that were compared: every token of the documents."""
    largest_difference: float
    """Largest difference of two log-probabilities, over all positions and tokens."""
    kl: float
    """Mean KL(student || export)."""
    information: float
    """Mean KL(student || uniform): the information in the student's predictions."""
    agreement: float
    """Share of positions with the same most probable token."""
    cached_difference: float
    """Largest difference of log-probabilities between the export with its cache and in one pass."""

    def excess(self, limits: Limits) -> str | None:
        """The figures beyond the limits, as a sentence; None if there are none."""
        found = []
        # `not <=` is true for NaN too
        for name, value, most in (
            ("largest difference", self.largest_difference, limits.logprob),
            ("KL", self.kl, min(limits.kl, limits.share * self.information)),
            ("largest difference with its cache", self.cached_difference, limits.cached),
        ):
            if not value <= most:
                found.append(f"{name} {value:.3g} (at most {most:.3g})")
        if not self.agreement >= limits.agreement:
            found.append(f"top-1 agreement {self.agreement:.1%} (at least {limits.agreement:.1%})")
        return ", ".join(found) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    fidelity: Fidelity
    figures: dict[str, Any]
    """Evaluation of the export on the documents: loss, KL from the teacher and others, as JSON."""
    student: dict[str, Any]
    """The same evaluation of the student."""


@torch.no_grad()
def compare(
    student: Runtime,
    export: Runtime,
    documents: Sequence[HeldoutDocument],
    vocabulary: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Run both on every document.

    vocabulary  V: number of tokens
    progress    is called with the number of compared documents

    Raises
        ColdstillError: one of them has another number of logits than V
    """
    distance, ours, theirs = _Distance(), _Figures(), _Figures()
    for done, document in enumerate(documents, 1):
        ours_TV = _logits(student.step(document.tokens_T)[0], vocabulary)
        theirs_TV = _logits(export.step(document.tokens_T)[0], vocabulary)
        distance.add(ours_TV, theirs_TV)
        if len(document.positions_M):
            ours.add(ours_TV, document)
            theirs.add(theirs_TV, document)
        progress(done)
    longest = max(documents, key=lambda document: len(document.tokens_T))
    fidelity = Fidelity(
        documents=len(documents),
        positions=distance.positions,
        largest_difference=distance.largest,
        kl=distance.kl / distance.positions,
        information=distance.information / distance.positions,
        agreement=distance.agreed / distance.positions,
        cached_difference=_cached_difference(export, longest.tokens_T, vocabulary),
    )
    return Comparison(fidelity=fidelity, figures=theirs.means(), student=ours.means())


@dataclass(slots=True)
class _Figures:
    """Evaluation of one model at the positions that have a target."""

    sums: Sums = field(default_factory=Sums)
    calibration: Calibration = field(default_factory=Calibration)

    def add(self, logits_TV: torch.Tensor, document: HeldoutDocument) -> None:
        rows = logits_TV[torch.from_numpy(document.positions_M)]
        # NaN is beyond every limit already
        add_positions(rows.nan_to_num(), document.target, self.sums, self.calibration)

    def means(self) -> dict[str, Any]:
        bins = [asdict(one) for one in self.calibration.bins()]
        return {**self.sums.means(), "ece": self.calibration.error(), "calibration": bins}


@dataclass(slots=True)
class _Distance:
    """Distance between two models, summed over positions in fp64."""

    positions: int = 0
    largest: float = 0.0
    kl: float = 0.0
    information: float = 0.0
    agreed: int = 0

    def add(self, ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> None:
        for start in range(0, len(ours_TV), _ROWS):
            rows = slice(start, start + _ROWS)
            ours, theirs = (logits[rows].double().log_softmax(1) for logits in (ours_TV, theirs_TV))
            largest = float((ours - theirs).abs().max())
            self.largest = float(np.maximum(self.largest, largest))  # keeps NaN, unlike `max`
            self.kl += float((ours.exp() * (ours - theirs)).sum())
            self.information += float((ours.exp() * (ours + math.log(ours.shape[1]))).sum())
            self.agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
        self.positions += len(ours_TV)


def _cached_difference(export: Runtime, tokens_T: NDArray[Any], vocabulary: int) -> float:
    whole_TV = _logits(export.step(tokens_T)[0], vocabulary)
    first = max(1, len(tokens_T) - _STEPS)
    part_TV, cache = export.step(tokens_T[:first])
    distance = _Distance()
    distance.add(whole_TV[:first], _logits(part_TV, vocabulary))
    if cache is None:  # without a cache, decoding runs full passes
        return distance.largest
    for place in range(first, len(tokens_T)):
        part_TV, cache = export.step(tokens_T[place : place + 1], cache)
        distance.add(whole_TV[place : place + 1], _logits(part_TV, vocabulary))
    return distance.largest


def _logits(logits_TV: NDArray[Any], vocabulary: int) -> torch.Tensor:
    """[T, V] fp32 logits, copied: some runtimes reuse the memory that they return."""
    if logits_TV.shape[1] != vocabulary:
        raise ColdstillError(
            f"gives logits of {logits_TV.shape[1]:,} tokens, expected {vocabulary:,}"
        )
    return torch.from_numpy(np.array(logits_TV, dtype=np.float32))


def resident_memory() -> int:
    """Resident memory of this process in bytes, after freed memory went back to the system."""
    give_back_freed_memory()
    return _status(os.getpid(), "VmRSS")


def writing_speed(runtime: Runtime, prompt: Passage, before: int) -> GenerationSpeed | None:
    """Time a runtime as `generation_speed` times students; None for one without a cache.

    Memory is the growth of its process from before loading to the peak while generating. For a
    torch model the weights' memory is computed instead of measured.

    before  `resident_memory()` before loading; unused for a runtime in another process
    """
    process, before = runtime.other_process or (os.getpid(), before)
    weights = weights_bytes(runtime.model) if isinstance(runtime, TorchRuntime) else None

    def step(tokens_BT: NDArray[Any], cache: Any, /) -> Any:
        logits_TV, cache = runtime.step(tokens_BT[0], cache, last=True)
        logits_TV[-1].argmax()
        return cache

    def peak() -> contextlib.AbstractContextManager[PeakMemory]:
        give_back_freed_memory()
        return _growth(process, before if weights is None else _status(process, "VmRSS"))

    return generation_speed(step, prompt, peak, weights or 0)


@contextlib.contextmanager
def _growth(process: int, before: int) -> Iterator[PeakMemory]:
    """Peak memory of a process during a block, minus `before`."""
    result = PeakMemory()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # kernels without this file: the peak since its start
            Path(f"/proc/{process}/clear_refs").write_text("5")
    yield result
    result.bytes = max(0, _status(process, "VmHWM") - before)


def _status(process: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return 0
