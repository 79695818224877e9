"""The record that makes a shard exist."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from .errors import ColdstillError
from .files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_Count = Annotated[int, Field(ge=0, le=2**62)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatistics:
    """Sums over a shard's supervised positions: means need no second look at the data."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    loss: float = 0.0
    """Sum of the teacher's -log p(label), in nats."""
    entropy: float = 0.0
    """Sum of the teacher's entropy, in nats."""
    head_mass: float = 0.0
    """Sum of the probability inside the head."""
    correct: int = 0
    """Positions whose most probable token is the label (0 if there is no head)."""
    separator_mass: float = 0.0
    """Sum of the teacher's probability of the separator where one comes next."""
    separators: int = 0
    """How many such positions there are."""

    def plus(self, other: ShardStatistics) -> ShardStatistics:
        """The sums over both."""
        ours, theirs = asdict(self), asdict(other)
        return ShardStatistics(**{name: ours[name] + theirs[name] for name in ours})


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Counts and checksum of one whole shard."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    shard: _Count
    sequences: _Count
    documents: _Count
    """Pieces of documents: one that was cut counts once per piece."""
    tokens: _Count
    positions: _Count
    bytes: _Count
    sha256: str
    statistics: ShardStatistics


def total(commits: Iterable[Commit]) -> ShardStatistics:
    """The sums over all of them."""
    sums = ShardStatistics()
    for commit in commits:
        sums = sums.plus(commit.statistics)
    return sums


_COMMIT = TypeAdapter(Commit)


def read_commit(path: Path) -> Commit:
    """Read a commit record.

    Raises
        ColdstillError: it is damaged
    """
    try:
        return _COMMIT.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ColdstillError(f"{path}: {place}: {first['msg']}") from error
