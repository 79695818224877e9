"""The commit record of a shard, without which the shard does not exist: files, counts and sums."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, TypeAdapter

from ..alignment import labels
from ..errors import ColdstillError, DamageError
from ..files import file_sha256, json_bytes, parse_json
from .layout import expect_seal, sealed, unseal, unsealed, validated

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from ..schema import Block

ENTROPY_BINS = 24
"""Bins of half a nat; the last bin has no upper limit."""
ENTROPY_BIN_WIDTH = 0.5
MASS_BINS = 20
"""Bins of 5 % of the probability."""
REPAIR = "run coldstill store repair, then teacher-logits again"
"""The remedy in messages about damaged shards."""

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Sum = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatistics:
    """Sums over supervised positions of the captured targets, before a codec rounds them. Those of
    distributions are over the positions that have one (`known`)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    loss: _Sum = 0.0
    """Sum of the teacher's -log p(label), in nats."""
    entropy: _Sum = 0.0
    """Sum of the teacher's entropy, in nats."""
    head_mass: _Sum = 0.0
    """Sum of the probability inside the head."""
    correct: _Count = 0
    """Positions whose most probable token is the label; 0 without a head."""
    separator_mass: _Sum = 0.0
    """Sum of the teacher's probability of the separator over positions whose label it is."""
    separators: _Count = 0
    """Number of positions whose label is the separator."""
    distortion: _Sum = 0.0
    """Sum of KL(captured || stored), in nats: the error of the codec."""
    entropy_bins: Annotated[tuple[_Count, ...], Field(max_length=ENTROPY_BINS)] = ()
    """Positions with an entropy of [0, 0.5), [0.5, 1), ... nats."""
    mass_bins: Annotated[tuple[_Count, ...], Field(max_length=MASS_BINS)] = ()
    """Positions whose head holds [0, 5), [5, 10), ... percent of the probability."""

    @property
    def known(self) -> int:
        """Positions with a distribution of the teacher; 0 if no histogram was kept."""
        return sum(self.entropy_bins)

    def plus(self, other: ShardStatistics) -> ShardStatistics:
        return ShardStatistics(
            **{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )


def total(statistics: Iterable[ShardStatistics]) -> ShardStatistics:
    sums = ShardStatistics()
    for one in statistics:
        sums = sums.plus(one)
    return sums


def known_positions(block: Block) -> NDArray[np.bool_] | slice:
    """An index of the positions that have a distribution of the teacher; a slice of all copies
    nothing."""
    return block.targets.chunk_sizes[:, 0] > 0 if block.capture.chunks else slice(None)


def block_statistics(
    block: Block, separator: tuple[int, ...], distortion_M: NDArray[np.float64]
) -> ShardStatistics:
    """Sum over a block, in float64.

    In a student's tokens, only positions that have a distribution of the teacher count for what is
    summed of distributions: at the others the record is an estimate, or the label alone.

    separator     ids between documents; the first one is counted
    distortion_M  KL(captured || stored) at each position (`data.codecs`)
    """
    targets, labels_M = block.targets, labels(block.sequences)
    known_M = known_positions(block)
    mass_M = _sums_of_exp(targets.head_logprobs[known_M])
    has_head = targets.head_ids.shape[1] > 0
    correct = int((targets.head_ids[known_M, 0] == labels_M[known_M]).sum()) if has_head else 0
    at_separator = labels_M == separator[0] if separator else np.zeros(len(labels_M), np.bool_)
    return ShardStatistics(
        loss=float(-targets.label_logprob.astype(np.float64).sum()),
        entropy=float(targets.entropy[known_M].astype(np.float64).sum()),
        head_mass=float(mass_M.sum()),
        correct=correct,
        separator_mass=float(np.exp(targets.label_logprob[at_separator].astype(np.float64)).sum()),
        separators=int(at_separator.sum()),
        distortion=float(distortion_M.sum()),
        entropy_bins=_histogram(targets.entropy[known_M], ENTROPY_BIN_WIDTH, ENTROPY_BINS),
        mass_bins=_histogram(mass_M, 1 / MASS_BINS, MASS_BINS),
    )


_AT_ONCE = 2048
"""Positions that are summed at a time: their probabilities stay in the processor's cache."""


def _sums_of_exp(logprobs_MK: NDArray[Any]) -> NDArray[np.float64]:
    """[M] the sum of the probabilities of each position."""
    sums_M = np.empty(len(logprobs_MK))
    for start in range(0, len(sums_M), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        sums_M[part] = np.exp(logprobs_MK[part], dtype=np.float64).sum(1)
    return sums_M


def _histogram(values_M: NDArray[Any], width: float, bins: int) -> tuple[int, ...]:
    place_M = np.clip((values_M / width).astype(np.int64), 0, bins - 1)
    return tuple(np.bincount(place_M, minlength=bins).tolist())


def _sum(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, tuple):
        return ours + theirs
    longest = max(len(ours), len(theirs))
    pairs = zip(*(side + (0,) * (longest - len(side)) for side in (ours, theirs)), strict=True)
    return tuple(a + b for a, b in pairs)


_STRICT: Any = {"extra": "forbid", "strict": True}
# A name inside the shard's folder, never outside; empty if the shard is one file.
_PART = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_Name = Annotated[str, Field(pattern=rf"^({_PART}(/{_PART})*)?$", max_length=200)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One file of a shard's data."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: _Name
    """The name in the shard's folder, or "" if the shard is one file."""
    bytes: _Count
    sha256: _Sha256

    def path(self, shard: str) -> str:
        """The file's name in the store, for a shard named `shard`."""
        return f"{shard}/{self.name}" if self.name else shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Counts, checksums and statistics of one shard."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    shard: _Count
    sequences: _Count
    documents: _Count
    """Number of documents; one that was cut counts once per piece."""
    tokens: _Count
    positions: _Count
    files: Annotated[tuple[ShardFile, ...], Field(min_length=1)]
    """The files of the shard, sorted by name."""
    statistics: ShardStatistics

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(slots=True)
class Totals:
    """What several commit records say together."""

    sequences: int = 0
    documents: int = 0
    tokens: int = 0
    positions: int = 0
    shard_bytes: list[int] = field(default_factory=list)
    """Bytes of each shard."""
    statistics: ShardStatistics = field(default_factory=ShardStatistics)

    @property
    def bytes(self) -> int:
        return sum(self.shard_bytes)

    def add(self, commit: Commit) -> None:
        """Add one record."""
        self.sequences += commit.sequences
        self.documents += commit.documents
        self.tokens += commit.tokens
        self.positions += commit.positions
        self.shard_bytes.append(commit.bytes)
        self.statistics = self.statistics.plus(commit.statistics)


_COMMIT = TypeAdapter(Commit)
_FILES = TypeAdapter(tuple[ShardFile, ...])


def shard_files(made: Path) -> tuple[ShardFile, ...]:
    """The files of a finished file or folder, with sizes and hashes."""
    inner = sorted(path for path in made.rglob("*") if path.is_file()) if made.is_dir() else [made]
    return tuple(
        ShardFile(
            name="" if path == made else path.relative_to(made).as_posix(),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
        )
        for path in inner
    )


def expect_files(made: Path, files: Iterable[ShardFile], where: str) -> None:
    """Compare every byte of a local shard with its commit record.

    where  the shard's path or address, for messages

    Raises
        DamageError: a file is missing, or is not what was written (which file)
    """
    for file in files:
        path = made / file.name if file.name else made
        address = file.path(where)
        expect_size(address, path.stat().st_size if path.is_file() else None, file)
        # Files of the tokenizer are cached without a hash.
        if file.sha256 and file_sha256(path) != file.sha256:
            raise DamageError(
                f"{address}: damaged: its checksum is not the one it was written with; {REPAIR}"
            )


def expect_size(path: str, size: int | None, file: ShardFile) -> None:
    """Raise DamageError unless a file of a shard has the size in its commit record.

    size  the actual size in bytes, or None if the file is missing
    """
    if size is None:
        raise DamageError(f"{path}: damaged: missing; {REPAIR}")
    if size != file.bytes:
        raise DamageError(f"{path}: damaged: {size} bytes, expected {file.bytes}; {REPAIR}")


def files_json(files: tuple[ShardFile, ...]) -> bytes:
    """The content of a record of files outside shards: those of the tokenizer."""
    return json_bytes(sealed({"files": [asdict(file) for file in files]}))


def parse_files(content: bytes, where: str) -> tuple[ShardFile, ...]:
    """Parse a record of files; raises ColdstillError if it is damaged."""
    return validated(_FILES, unseal(content, where).get("files"), where)


def commit_json(commit: Commit) -> bytes:
    return json_bytes(sealed(asdict(commit)))


def parse_commit(content: bytes, where: str) -> Commit:
    """Parse a commit record; raises ColdstillError if it is damaged."""
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise ColdstillError(f"{where}: not a commit record")
    commit = validated(_COMMIT, unsealed(value), where)
    expect_seal(value, where)
    return commit
