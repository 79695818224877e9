"""Packs documents into sequences; the files of a prepared corpus (sequences per split, a record).

Packing fills sequences of at most `length` tokens without losing tokens. A document that fits is
never cut: it goes into the open sequence with the least room that is enough. A longer document is
cut into pieces of `length` tokens. Each piece begins with the last token of the piece before, so
that every token of a document except its first is the label of exactly one position.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from .alignment import supervised_positions
from .columns import check_hashes, from_sequences, to_sequences
from .corpus.document import REASONS
from .errors import ColdstillError
from .files import read_json
from .formats.arrow import ArrowStore
from .ragged import Ragged
from .schema import Sequences, sequence_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from .columns import Columns

OPEN_SEQUENCES = 64
"""Number of partly filled sequences that wait for documents that fit. A larger number leaves less
padding but mixes documents from further apart. With 64, real corpora have about one per cent
padding."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """One document, or a piece of one, as token ids."""

    index: int
    """Index of the document in the corpus."""
    tokens_T: NDArray[np.int32]
    learned_T: NDArray[np.bool_]
    """[T] whether a token is learned."""


@dataclass(slots=True, eq=False)
class _OpenSequence:
    length: int = 0
    pieces: list[TokenizedDocument] = field(default_factory=list)


class Packer:
    """Turns a stream of documents into a stream of sequences, deterministically."""

    def __init__(self, length: int, *, together: bool) -> None:
        """Pack into sequences of `length` tokens; without `together` each holds one piece."""
        if length < 2:
            raise ValueError(f"a sequence needs at least 2 tokens, got {length}")
        self._length = length
        self._together = together
        self._open: list[_OpenSequence] = []
        self.counts: Counter[str] = Counter()
        """Counts: documents, cut_documents, unlearnable_pieces."""

    def add(self, document: TokenizedDocument) -> Iterator[list[TokenizedDocument]]:
        """Add a document; yields the sequences that are full now, as lists of pieces."""
        self.counts["documents"] += 1
        pieces = list(self._cut(document))
        self.counts["cut_documents"] += len(pieces) > 1
        for piece in pieces:
            if not piece.learned_T[1:].any():  # none of its tokens would be a label
                self.counts["unlearnable_pieces"] += 1
            elif not self._together or len(piece.tokens_T) == self._length:
                yield [piece]
            else:
                yield from self._place(piece)

    def finish(self) -> Iterator[list[TokenizedDocument]]:
        for sequence in self._open:
            yield sequence.pieces
        self._open = []

    def _cut(self, document: TokenizedDocument) -> Iterator[TokenizedDocument]:
        step = self._length - 1
        for start in range(0, max(1, len(document.tokens_T) - 1), step):
            part = slice(start, start + self._length)
            yield TokenizedDocument(
                document.index, document.tokens_T[part], document.learned_T[part]
            )

    def _place(self, piece: TokenizedDocument) -> Iterator[list[TokenizedDocument]]:
        size = len(piece.tokens_T)
        fitting = [s for s in self._open if s.length + size <= self._length]
        # `max` takes the first, oldest of equals: the order is the same on every machine.
        target = max(fitting, key=lambda s: s.length, default=None)
        if target is None:
            target = _OpenSequence()
            self._open.append(target)
        target.length += size
        target.pieces.append(piece)
        # A document of one token has no label.
        if target.length >= self._length - 1:
            self._open.remove(target)
            yield target.pieces
        elif len(self._open) > OPEN_SEQUENCES:
            fullest = max(self._open, key=lambda s: s.length)
            self._open.remove(fullest)
            yield fullest.pieces


def build_sequences(first_id: int, packed: list[list[TokenizedDocument]]) -> Sequences:
    """Packed pieces as `Sequences`, with ids from `first_id` on."""
    tokens, starts, documents, positions, hashes = [], [], [], [], []
    for pieces in packed:
        lengths = [len(piece.tokens_T) for piece in pieces]
        starts_D = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int32)
        tokens_T = np.concatenate([piece.tokens_T for piece in pieces])
        learned_T = np.concatenate([piece.learned_T for piece in pieces])
        positions_M = supervised_positions(learned_T, starts_D)
        tokens.append(tokens_T)
        starts.append(starts_D)
        documents.append([piece.index for piece in pieces])
        positions.append(positions_M)
        hashes.append(sequence_hash(tokens_T, starts_D, positions_M))
    return Sequences(
        ids=np.arange(first_id, first_id + len(packed), dtype=np.int64),
        tokens=Ragged.from_rows(tokens, np.int32),
        document_starts=Ragged.from_rows(starts, np.int32),
        document_ids=Ragged.from_rows(documents, np.int64),
        positions=Ragged.from_rows(positions, np.int32),
        hashes=np.array(hashes, dtype=np.uint64),
    )


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
        return self._length

    def read(self, rows: NDArray[np.int64] | range) -> Sequences:
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
