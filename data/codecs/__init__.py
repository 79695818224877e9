"""Codecs convert blocks to columns and back. Each is one file or folder and one line in `CODECS`.

A codec is a frozen dataclass. The manifest records exactly its fields.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from .compact.codec import CompactCodec
from .plain import PlainCodec
from .version2 import CompactVersion2, PlainVersion2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..columns import Columns
    from ..schema import Block, Capture, Tail, Targets


class Codec(Protocol):
    """Converts a block to columns and back."""

    name: ClassVar[str]
    compress: ClassVar[bool]
    """Whether the format should compress the columns; otherwise they can be memory-mapped."""
    rounding: ClassVar[float]
    """Upper bound of the error of label and sample log-probabilities and of entropies, in nats."""

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> Codec:
        """The codec for a store with this capture; `settings` come from the recipe. Raises
        TypeError, ValueError for an unknown setting, a wrong value, or too large a vocabulary."""

    def learned(self, block: Block) -> Codec:
        """The codec with settings that follow from the first block of a store."""

    def maximum_error(self, capture: Capture) -> float:
        """Upper bound of |sqrt(p stored) - sqrt(p captured)| over head entries at temperature 1."""

    def encode(self, block: Block) -> Columns:
        """The whole block as columns, one row per sequence."""

    def rounds_as(self, other: Codec) -> bool:
        """Whether both codecs round alike, so that `recode` loses nothing."""

    def recode(self, columns: Columns, capture: Capture, other: Codec) -> Columns:
        """Columns of another codec that rounds alike, as columns of this one."""

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block. Raises ValueError or KeyError if the columns do not fit the capture."""


CODECS: dict[str, type[Codec]] = {
    "compact": CompactCodec,
    "plain": PlainCodec,
}
READABLE: dict[int, dict[str, type[Codec]]] = {
    2: {"compact": CompactVersion2, "plain": PlainVersion2},
    3: CODECS,
}
"""The codecs of every format version that is read; the last version is written."""


_Error = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecError:
    """The error of a store's codec, as the manifest records it."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    maximum: _Error = 0.0
    """Upper bound of |sqrt(p stored) - sqrt(p captured)| over head entries."""
    measured: _Error = 0.0
    """Largest such difference on the first block."""
    kl: _Error = 0.0
    """Mean KL(captured || stored) on the first block, in nats."""
    rounding: _Error = 0.0
    """Upper bound of the error of label and sample log-probabilities and of entropies, in nats."""

    def plus(self, other: CodecError) -> CodecError:
        """The error of targets that passed two codecs, one after the other.

        The bounds add up, since sqrt(p) maps distributions to points and distances obey the
        triangle inequality. KL is not a distance: its sum is an estimate, not a bound.
        """
        return CodecError(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def distortion(captured: Targets, stored: Targets) -> NDArray[np.float64]:
    """[M] KL(captured || stored) in nats, over the head tokens and one cell for all others. Raises
    ValueError if an id or a count differs from the captured one (at which position)."""
    same = ("head_ids", "head_logprobs", "log_tail")
    if (
        not len(captured.tail.ids)
        and not len(stored.tail.ids)
        and all(np.array_equal(getattr(captured, name), getattr(stored, name)) for name in same)
    ):
        return np.zeros(len(captured))
    found, wanted = _heads(stored, captured)
    _expect_same((found[0] != wanted[0]).any(1), "head ids")
    _expect_same(_differing(captured.tail, stored.tail), "tail ids or counts")
    p_MK, q_MK = wanted[1], found[1]
    rest_M = captured.log_tail.astype(np.float64)
    kl_M = (np.exp(p_MK) * (p_MK - q_MK)).sum(1)
    has_rest = rest_M > -np.inf
    kl_M[has_rest] += np.exp(rest_M[has_rest]) * (rest_M[has_rest] - stored.log_tail[has_rest])
    # float32 log-probabilities do not sum to exactly 1
    positive: NDArray[np.float64] = np.maximum(kl_M, 0.0)
    return positive


def expect_rounded(captured: Targets, stored: Targets, rounding: float) -> None:
    """Raise ValueError if a label's log-probability or an entropy is off by more than `rounding`
    nats (at which position)."""
    for name in ("label_logprob", "entropy"):
        wanted_M = getattr(captured, name).astype(np.float64)
        # 1e-6 for float32; a probability of 1 may be captured as slightly more, or an entropy of 0
        # as slightly less
        most_M = rounding + 1e-5 + 1e-6 * np.abs(wanted_M)
        _expect_same(np.abs(getattr(stored, name) - wanted_M) > most_M, name)


def largest_error(captured: Targets, stored: Targets) -> float:
    """Largest |sqrt(p stored) - sqrt(p captured)| over all head entries."""
    found, wanted = (head[1] for head in _heads(stored, captured))
    return float(np.abs(np.exp(found / 2) - np.exp(wanted / 2)).max(initial=0.0))


def measure(captured: Block, stored: Block, maximum: float, rounding: float = 0.0) -> CodecError:
    """The error of one block."""
    kl_M = distortion(captured.targets, stored.targets)
    return CodecError(
        maximum=maximum,
        measured=largest_error(captured.targets, stored.targets),
        kl=float(kl_M.mean()) if len(kl_M) else 0.0,
        rounding=rounding,
    )


_Head = tuple["NDArray[np.int32]", "NDArray[np.float64]"]


def _heads(one: Targets, other: Targets) -> tuple[_Head, _Head]:
    """Ids and log-probabilities of two heads, by id unless both have the same order."""
    if np.array_equal(one.head_ids, other.head_ids):
        first, second = (each.head_logprobs.astype(np.float64) for each in (one, other))
        return (one.head_ids, first), (other.head_ids, second)
    return _sorted_head(one), _sorted_head(other)


def _sorted_head(targets: Targets) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    order_MK = np.argsort(targets.head_ids, axis=1)
    ids = np.take_along_axis(targets.head_ids, order_MK, axis=1)
    logprobs = np.take_along_axis(targets.head_logprobs, order_MK, axis=1)
    return ids, logprobs.astype(np.float64)


def _differing(one: Tail, other: Tail) -> NDArray[np.bool_]:
    """[M] whether the samples of a position differ, in whatever order they are."""
    differ_M = one.lengths != other.lengths
    if differ_M.any():
        return np.asarray(differ_M)
    first, second = (np.lexsort((tail.ids, tail.rows())) for tail in (one, other))
    differ_J = (one.ids[first] != other.ids[second]) | (one.counts[first] != other.counts[second])
    counts_M = one.sums(differ_J)
    return np.not_equal(counts_M, 0.0)


def _expect_same(wrong_M: NDArray[np.bool_], what: str) -> None:
    if wrong_M.any():
        place = int(np.flatnonzero(wrong_M)[0])
        raise ValueError(f"the codec changes the {what} of position {place}")
