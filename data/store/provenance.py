"""Where the text or the targets of a store come from, if not from its corpus and its capture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..files import json_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence


_Count = Annotated[int, Field(ge=0, le=2**62)]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_STRICT: Any = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How a model answered prompts: the teacher, if its own answers were captured, or a student."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    max_new_tokens: _Size
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """The sampling temperature; 0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    top_k: _Count
    """Number of most probable tokens that are sampled from; 0 for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing(Generation):
    """The student that wrote the sequences, if the teacher scores a student's own text."""

    fingerprint: str
    """SHA-256 of the student's weights."""
    round: _Size
    """The number of the training, from 1, after which it wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Where the targets of an imported store come from, and what they lack."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    format: str
    """Name of the format, one of `data.imports.FORMATS`."""
    source: tuple[str, ...]
    """The files as the user named them."""
    fingerprint: str
    """SHA-256 over names and sizes of the files."""
    settings: dict[str, Any]
    """The parameters of the source's codec."""
    alignment: Literal["own", "next"]
    """Whether the source stores a row at the token that it is about, or at the one before."""
    measured: dict[str, float]
    """The mean of 1 / rank of the label in the first rows under each reading, 0 where the label is
    not among them; `rows` is their number."""
    values: Literal["logprobs", "renormalised", "logits", "full"]
    """Log-probabilities of the vocabulary; the same renormalised over the kept tokens; logits whose
    normaliser is not known; or the whole distribution."""
    lost: tuple[str, ...]
    """What the source does not hold, one sentence each."""
    counts: dict[str, _Count] = field(default_factory=dict)
    """Rows and records that were left out or changed, by what happened."""
    estimated: tuple[str, ...] = ()
    """Numbers of the store that are estimates where the source does not say them."""


def joined(parts: Sequence[Imported | None]) -> Imported | None:
    """The provenance of stores that are merged; None unless all were imported. What is said of how
    the source was read is that of the first."""
    imported = [part for part in parts if part is not None]
    if not imported or len(imported) < len(parts):
        return None
    counts: Counter[str] = Counter()
    for part in imported:
        counts.update(part.counts)
    return replace(
        imported[0],
        source=tuple(dict.fromkeys(name for part in imported for name in part.source)),
        fingerprint=json_sha256([part.fingerprint for part in imported]),
        lost=tuple(dict.fromkeys(text for part in imported for text in part.lost)),
        counts=dict(counts),
        estimated=tuple(dict.fromkeys(name for part in imported for name in part.estimated)),
    )


def origin_text(imported: Imported) -> str:
    """Where a store comes from, in one line."""
    files = ", ".join(imported.source[:3]) + (", ..." if len(imported.source) > 3 else "")
    about = {"own": "their own token", "next": "the next token"}[imported.alignment]
    return f"imported from {imported.format}: {files}, rows about {about} in the source"
