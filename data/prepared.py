"""A tokenised and packed corpus: a file of sequences for each split, and a record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from .columns import check_hashes, from_sequences, to_sequences
from .corpus.bad_rows import REASONS
from .errors import ColdstillError
from .files import read_json
from .formats.arrow import ArrowStore
from .packing import TokenizedDocument, build_sequences
from .schema import Sequences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from .columns import Columns

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

BLOCK_SEQUENCES = 64

SKIPPED_ROWS = (
    "unrenderable_chats", "unrendered_messages", "unlocated_turns", "too_long_prompts",
    "empty_prompts", "rowless_tokens", *REASONS,
)  # fmt: skip
"""The kinds of rows that `corpus.bad_rows = "skip"` skips, as keys of a record's counts."""

_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """Counts and hashes of one split."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    documents: _Count
    bytes: _Count
    """Size of its text in UTF-8."""
    sequences: _Count
    tokens: _Count
    positions: _Count
    content: str
    """SHA-256 over the content of its documents, in order."""
    packing: str
    """SHA-256 over its sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRecord:
    """How a corpus was prepared. Written last: if it exists, both files are complete."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    settings: dict[str, Any]
    """The corpus settings of the recipe, and the tokenizer's fingerprint."""
    sources: list[list[Any]]
    """Name, bytes, modification time and SHA-256 of each source."""
    together: bool
    separator: list[int]
    """The token ids added after each plain document."""
    splits: dict[Split, SplitRecord]
    counts: dict[str, int]
    """Counts: empty_documents, cut_documents, unlearnable_pieces, those of `SKIPPED_ROWS`, and
    parts of chats that the chat template omits."""
    prompts: bool = False
    """Whether the sequences are prompts for the teacher, one each, without learned tokens."""

    @property
    def skipped(self) -> int:
        """How many rows were skipped."""
        return sum(self.counts.get(name, 0) for name in SKIPPED_ROWS)


_RECORD = TypeAdapter(CorpusRecord)


@dataclass(frozen=True, slots=True)
class CorpusLayout:
    """The files of a prepared corpus."""

    root: Path

    @property
    def record(self) -> Path:
        """The path of the record, which is written last."""
        return self.root / "corpus.json"

    def split(self, split: Split) -> Path:
        """The path of the sequences of one split."""
        return self.root / f"{split}.arrow"

    def read_record(self) -> CorpusRecord | None:
        """The record, or None if the corpus was not prepared."""
        if not self.record.exists():
            return None
        try:
            return _RECORD.validate_python(read_json(self.record))
        except ValidationError as error:
            raise ColdstillError(
                f"{self.record}: damaged ({error.error_count()} fields); delete the folder "
                f"{self.root} to prepare the corpus again"
            ) from error

    def open(self, split: Split) -> SequenceFile:
        """Open the sequences of one split."""
        return SequenceFile(self.split(split))


class SequenceWriter:
    """Writes packed sequences in blocks of `BLOCK_SEQUENCES`."""

    def __init__(self, add: Callable[[Columns], None]) -> None:
        """Pass each block to `add`, a function that `ArrowStore.create` yields."""
        self._add = add
        self._waiting: list[list[TokenizedDocument]] = []
        self._digest = hashlib.sha256()
        self.sequences = self.tokens = self.positions = 0

    def add(self, pieces: list[TokenizedDocument]) -> None:
        """Add one packed sequence."""
        self._waiting.append(pieces)
        if len(self._waiting) == BLOCK_SEQUENCES:
            self._flush()

    def finish(self) -> str:
        """Write the last block; returns the SHA-256 over all sequences."""
        if self._waiting:
            self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        block = build_sequences(self.sequences, self._waiting)
        self._add(from_sequences(block))
        self._digest.update(block.hashes.astype("<u8").tobytes())
        self.sequences += len(block)
        self.tokens += len(block.tokens.values)
        self.positions += len(block.positions.values)
        self._waiting = []


class SequenceFile:
    """A memory-mapped file of sequences."""

    def __init__(self, path: Path) -> None:
        """Map the file; raises ColdstillError if it is damaged."""
        self._path = path
        self._shard = ArrowStore().open(path)
        blocks = self._shard.blocks
        self._length = (blocks - 1) * BLOCK_SEQUENCES + len(self._block(blocks - 1))

    def __len__(self) -> int:
        """The number of sequences."""
        return self._length

    def read(self, rows: NDArray[np.int64]) -> Sequences:
        """The sequences with these indices, in the given order.

        Raises
            IndexError: an index is out of range, or there is none
            ColdstillError: the file is damaged
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"sequences {rows.tolist()} of {len(self)}")
        parts, found = [], []
        for block in np.unique(rows // BLOCK_SEQUENCES):
            chosen = np.flatnonzero(rows // BLOCK_SEQUENCES == block)
            parts.append(self._block(int(block), rows[chosen] % BLOCK_SEQUENCES))
            found.append(chosen)
        sequences = Sequences.concatenate(parts) if len(parts) > 1 else parts[0]
        return sequences.take(np.argsort(np.concatenate(found), kind="stable"))

    def batches(self, size: int) -> Iterator[Sequences]:
        """All sequences in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(np.arange(start, min(start + size, len(self))))

    def _block(self, number: int, rows: NDArray[np.int64] | None = None) -> Sequences:
        """A block, or the given rows of it with their hashes checked."""
        columns = self._shard.read(number)
        try:
            sequences = to_sequences(columns)
            if rows is not None:
                sequences = sequences.take(rows)
                check_hashes(sequences)
        except (ValueError, KeyError, IndexError) as error:
            raise ColdstillError(f"{self._path}: block {number}: {error}") from error
        return sequences
