"""Whether an export says what its student says, document by document.

Both are asked about the same held-out text; what is compared is the whole distribution at every
place. An export is asked twice about one document: all at once, and token by token with its cache.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import ColdstillError
from ..evaluate import Sums, add_positions
from ..evaluation.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .contract import Limits, Runtime
    from .documents import Document

_STEPS = 16
"""So many tokens of a document are fed one by one."""
_ROWS = 64
"""Places compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How far an export is from its student, in natural logarithms."""

    documents: int
    positions: int
    """Places compared: every token of them."""
    largest_difference: float
    """Of two log-probabilities, over all places and tokens."""
    kl: float
    """Mean KL(student || export)."""
    information: float
    """Mean KL(student || uniform): what there is to lose."""
    agreement: float
    """Share of places with the same most probable token."""
    cached_difference: float
    """As `largest_difference`, between the export token by token and all at once."""

    def excess(self, limits: Limits) -> str | None:
        """What is beyond the limits, as a sentence; None if nothing is."""
        found = []
        # written so that what is no number is beyond every limit
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

    def to_json(self) -> dict[str, Any]:
        """As it is recorded."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What came of asking."""

    fidelity: Fidelity
    figures: dict[str, Any]
    """As in `evaluate.Evaluation`: loss, KL from the teacher and so on, on the same documents;"""
    student: dict[str, Any]
    """the student's."""


@torch.no_grad()
def check(
    student: Runtime,
    export: Runtime,
    documents: Sequence[Document],
    vocabulary: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Checked:
    """Ask both about every document.

    vocabulary  V: how many tokens there are
    tell        hears how many documents are done

    Raises
        ColdstillError: one of them knows of more tokens, or of fewer
    """
    distance, ours, theirs = _Distance(), _Figures(), _Figures()
    for done, document in enumerate(documents, 1):
        ours_TV = _logits(student.step(document.tokens_T)[0], vocabulary)
        theirs_TV = _logits(export.step(document.tokens_T)[0], vocabulary)
        distance.add(ours_TV, theirs_TV)
        if len(document.positions_M):
            ours.add(ours_TV, document)
            theirs.add(theirs_TV, document)
        tell(done)
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
    return Checked(fidelity=fidelity, figures=theirs.means(), student=ours.means())


@dataclass(slots=True)
class _Figures:
    """Of one model, over the places that have a target."""

    sums: Sums = field(default_factory=Sums)
    calibration: Calibration = field(default_factory=Calibration)

    def add(self, logits_TV: torch.Tensor, document: Document) -> None:
        """Take the logits of a document."""
        rows = logits_TV[torch.from_numpy(document.positions_M)]
        # what is no number is beyond every limit, and has no figures
        add_positions(rows.nan_to_num(), document.target, self.sums, self.calibration)

    def means(self) -> dict[str, Any]:
        """As in `evaluate.Evaluation`."""
        found = self.calibration
        return {**self.sums.means(), "ece": found.error(), "calibration": found.bins()}


@dataclass(slots=True)
class _Distance:
    """Between two models, place by place."""

    positions: int = 0
    largest: float = 0.0
    kl: float = 0.0
    information: float = 0.0
    agreed: int = 0

    def add(self, ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> None:
        """Take the logits of a document; in fp64, some places at a time."""
        for start in range(0, len(ours_TV), _ROWS):
            rows = slice(start, start + _ROWS)
            ours, theirs = (logits[rows].double().log_softmax(1) for logits in (ours_TV, theirs_TV))
            largest = float((ours - theirs).abs().max())
            # unlike `max`, this keeps what is no number
            self.largest = float(np.maximum(self.largest, largest))
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
    if cache is None:  # it keeps nothing, so whoever runs it asks for all tokens again
        return distance.largest
    for place in range(first, len(tokens_T)):
        part_TV, cache = export.step(tokens_T[place : place + 1], cache)
        distance.add(whole_TV[place : place + 1], _logits(part_TV, vocabulary))
    return distance.largest


def _logits(logits_TV: NDArray[Any], vocabulary: int) -> torch.Tensor:
    """[T, V] fp32. A copy: some runtimes hand out memory that they write into again.

    Raises
        ColdstillError: they are of another number of tokens
    """
    if logits_TV.shape[1] != vocabulary:
        raise ColdstillError(
            f"gives logits of {logits_TV.shape[1]:,} tokens, where there are {vocabulary:,}"
        )
    return torch.from_numpy(np.array(logits_TV, dtype=np.float32))
