"""How far what a codec gives back is from what it was given."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .schema import Block, Targets

_Error = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecError:
    """What a store's manifest says of its codec's error."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    maximum: _Error = 0.0
    """No |sqrt(p stored) - sqrt(p captured)| of a head entry can be larger."""
    measured: _Error = 0.0
    """The largest that was seen on the first block."""
    kl: _Error = 0.0
    """Mean KL(captured || stored) there, in nats."""
    rounding: _Error = 0.0
    """No log-probability of a label or a sample, and no entropy, can be further off, in nats."""

    def plus(self, other: CodecError) -> CodecError:
        """Of a record that went through two codecs, one after the other.

        sqrt(p) makes distributions points, and distances between points add up at most; a KL is no
        distance: its sum is what both cost, not a bound.
        """
        return CodecError(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def distortion(captured: Targets, stored: Targets) -> NDArray[np.float64]:
    """[M] KL(captured || stored) over the head's tokens and the rest as one, in nats.

    Raises
        ValueError: an id is not the one that was captured (at which position)
    """
    found, wanted = _sorted_head(stored), _sorted_head(captured)
    _expect_same(found[0], wanted[0], "head")
    _expect_same(stored.tail_ids, captured.tail_ids, "tail")
    p_MK, q_MK = wanted[1], found[1]
    rest_M = captured.log_tail.astype(np.float64)
    kl_M = (np.exp(p_MK) * (p_MK - q_MK)).sum(1)
    has_rest = rest_M > -np.inf
    kl_M[has_rest] += np.exp(rest_M[has_rest]) * (rest_M[has_rest] - stored.log_tail[has_rest])
    # rounding of float32 log-probabilities leaves sums a little off 1
    positive: NDArray[np.float64] = np.maximum(kl_M, 0.0)
    return positive


def largest_error(captured: Targets, stored: Targets) -> float:
    """The largest |sqrt(p stored) - sqrt(p captured)| over all head entries."""
    found, wanted = _sorted_head(stored)[1], _sorted_head(captured)[1]
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


def _sorted_head(targets: Targets) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    order_MK = np.argsort(targets.head_ids, axis=1)
    ids = np.take_along_axis(targets.head_ids, order_MK, axis=1)
    logprobs = np.take_along_axis(targets.head_logprobs, order_MK, axis=1)
    return ids, logprobs.astype(np.float64)


def _expect_same(found: NDArray[Any], wanted: NDArray[Any], what: str) -> None:
    wrong_M = (found != wanted).any(1)
    if wrong_M.any():
        place = int(np.flatnonzero(wrong_M)[0])
        raise ValueError(f"{what} ids of position {place} do not come back from the codec")
