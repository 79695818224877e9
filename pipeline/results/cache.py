"""Facts of the teacher's cache: its size, the teacher's figures and the cost of its codec."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...data.errors import ColdstillError
from ...data.store.commit import ENTROPY_BIN_WIDTH, ENTROPY_BINS, MASS_BINS, total
from ...data.store.layout import MEASUREMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...data.codecs import CodecError
    from ...data.schema import Capture
    from ...data.store.reader import StoreReader

_LOGIT_BYTES = 2
"""Bytes of a logit in 16 bits, for the size of a store of all logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Positions for each bin; a bin begins at its value in `starts`."""

    starts: tuple[float, ...]
    positions: tuple[int, ...]


class Measurements(BaseModel):
    """What a capture measured of itself; further keys of the file are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")
    capture_tokens_per_second: float | None = None
    capture_peak_memory_bytes: int | None = None
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """A store of the teacher's record. Means are over all positions, None without a position."""

    path: str
    shards: int
    shards_done: int
    sequences: int
    planned_sequences: int
    tokens: int
    positions: int
    bytes: int
    full_logits_bytes: int
    """Size of all logits of these positions at 16 bits each."""
    bytes_per_position: float | None
    teacher_loss: float | None
    """Mean -log p(label) of the teacher in nats."""
    teacher_entropy: float | None
    head_mass: float | None
    """Mean probability inside the head."""
    codec_kl: float | None
    """Mean KL(captured || stored) in nats."""
    entropy_histogram: Histogram
    mass_histogram: Histogram
    """Positions by the probability inside the head."""
    measurements: Measurements
    capture: Capture
    codec: dict[str, Any]
    """Name and settings."""
    store: dict[str, Any]
    """Name and settings of the shard format."""
    error: CodecError
    vocabulary: int

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        value = asdict(self) | {
            "measurements": self.measurements.model_dump(mode="json", exclude_unset=True)
        }
        value["histograms"] = {
            name: {"from": histogram["starts"], "positions": histogram["positions"]}
            for name, histogram in (
                ("entropy", value.pop("entropy_histogram")),
                ("head_mass", value.pop("mass_histogram")),
            )
        }
        return value


def cache_facts(store: StoreReader) -> CacheFacts:
    """Facts from the manifest, the commit records and the measurements; no sequence is read.

    Raises
        ColdstillError: a commit record is damaged
    """
    manifest, commits = store.manifest, list(store.commits())
    sums = total(commit.statistics for commit in commits)
    positions = sum(commit.positions for commit in commits)
    stored = sum(commit.bytes for commit in commits)
    size = manifest.tokenizer.size

    def mean(value: float) -> float | None:
        return value / positions if positions else None

    return CacheFacts(
        path=str(store.place),
        shards=manifest.shards,
        shards_done=len(commits),
        sequences=sum(commit.sequences for commit in commits),
        planned_sequences=manifest.sequences,
        tokens=sum(commit.tokens for commit in commits),
        positions=positions,
        bytes=stored,
        full_logits_bytes=positions * size * _LOGIT_BYTES,
        bytes_per_position=mean(stored),
        teacher_loss=mean(sums.loss),
        teacher_entropy=mean(sums.entropy),
        head_mass=mean(sums.head_mass),
        codec_kl=mean(sums.distortion),
        entropy_histogram=_histogram(sums.entropy_bins, ENTROPY_BINS, ENTROPY_BIN_WIDTH),
        mass_histogram=_histogram(sums.mass_bins, MASS_BINS, 1 / MASS_BINS),
        measurements=_measurements(store),
        capture=manifest.capture,
        codec=manifest.codec,
        store=manifest.store,
        error=manifest.error,
        vocabulary=size,
    )


def _histogram(counts: Sequence[int], bins: int, width: float) -> Histogram:
    return Histogram(
        starts=tuple(place * width for place in range(bins)),
        positions=(*counts, *[0] * (bins - len(counts))),
    )


def _measurements(store: StoreReader) -> Measurements:
    """What the capture measured; nothing if the file is missing or damaged."""
    if not store.place.exists(MEASUREMENTS):
        return Measurements()
    try:
        return Measurements.model_validate_json(store.place.read(MEASUREMENTS))
    except (ColdstillError, ValidationError):
        return Measurements()
