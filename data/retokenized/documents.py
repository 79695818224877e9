"""Writes sequences again in the tokens of a student, document by document.

Each document, or piece of one, keeps its place: the new sequence holds the same documents in the
same order. Between special tokens the student's tokenizer takes the text as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..alignment import label_places
from ..errors import ColdstillError
from ..prepared import TokenizedDocument, build_sequences
from ..schema import LONGEST_CHUNK
from .chunks import Laid, chunks_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Sequences
    from .mapping import TokenMap
    from .spelling import Speller, Spelling

LEAST_LOGPROB = -1000.0
"""Smallest log-probability of a chunk, in nats; a less probable one is left out of training."""


@dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    """Sequences in the student's tokens, and what their positions have of the teacher."""

    sequences: Sequences
    rows_M: NDArray[np.int64]
    """[M] the teacher's position whose distribution each position has; -1 where it has none."""
    sizes_M: NDArray[np.int32]
    """[M] the size of the chunk that begins at each position; 0 inside a chunk, negative where the
    chunk has no distribution."""
    logprobs_M: NDArray[np.float32]
    """[M] the teacher's log-probability of that chunk; 0 inside a chunk."""
    firsts_M: NDArray[np.int32]
    """[M] the teacher's first token in the chunk that begins at each position; -1 inside a chunk,
    and where the chunk is not several tokens of the teacher and one of the student."""
    pairs: Counter[tuple[int, int]]
    """How often the teacher has one token and the student another one at a shared border."""
    counts: Counter[str]
    """Counts of `store.retokenized.Retokenized`."""


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive text tokens of the teacher, or one special token."""

    first: int
    """Its first token in the piece."""
    lengths: list[int]
    """Units of each of its tokens."""
    ids: tuple[int, ...] = ()
    """The student's tokens of a special token."""
    text: int | None = None
    """Its index among the texts that are spelled; None for a special token."""
    added: bool = False
    """Whether the teacher's first token has a space that the text does not have."""


@dataclass(slots=True, eq=False)
class _Piece:
    document: int
    tokens_T: NDArray[np.int32]
    rows_T: NDArray[np.int64]
    """[T] the teacher's position that predicts each token; -1 if it is not learned."""
    where: str
    runs: list[_Run] = field(default_factory=list)
    unknown: str | None = None
    """Why its text is not known."""


class Rewriter:
    """Writes the documents of one tokenizer in the tokens of another one."""

    def __init__(self, teacher: Speller, student: Speller, table: TokenMap, *, skip: bool) -> None:
        """Use two tokenizers and their table.

        skip  keep texts that the student's tokenizer does not reproduce, but learn nothing of them;
              otherwise they are refused
        """
        self._teacher, self._student, self._table, self._skip = teacher, student, table, skip
        self._prefix = () if teacher.prefix() else student.prefix()

    def __call__(
        self, sequences: Sequences, logprobs_M: NDArray[np.float32], lacking_M: NDArray[np.bool_]
    ) -> Rewritten:
        """Write sequences again.

        logprobs_M  the teacher's log-probability of the label at each supervised position
        lacking_M   whether nothing of its distribution can be mapped

        Raises
            ColdstillError: a special token has no counterpart, or a text is not reproduced
        """
        texts: list[tuple[bytes, bool]] = []
        packed = [[self._read(piece, texts) for piece in pieces] for pieces in _pieces(sequences)]
        spellings = self._student.spell(texts)
        counts: Counter[str] = Counter({"teacher_labels": len(logprobs_M)})
        known = logprobs_M, lacking_M
        made, positions = [], []
        pairs: Counter[tuple[int, int]] = Counter()
        for row, pieces in enumerate(packed):
            written = [self._write(p, texts, spellings, known, (counts, pairs)) for p in pieces]
            kept = [(document, own) for document, own in written if len(document.tokens_T)]
            counts["skipped_pieces"] += len(written) - len(kept)
            if not kept:
                raise ColdstillError(
                    f"sequence {int(sequences.ids[row])}: {self._student.where} has no token for "
                    "any of its texts; take it out with coldstill store slice"
                )
            made.append([document for document, _ in kept])
            positions += [own for _, own in kept]
        joined = [np.concatenate(parts) for parts in zip(*positions, strict=True)]
        rows, sizes, logprobs, firsts = joined
        counts["left_labels"] = len(logprobs_M) - counts.pop("kept_labels", 0)
        return Rewritten(
            sequences=replace(build_sequences(0, made), ids=sequences.ids),
            rows_M=rows,
            sizes_M=sizes,
            logprobs_M=logprobs,
            firsts_M=firsts,
            pairs=pairs,
            counts=counts,
        )

    def _read(self, piece: _Piece, texts: list[tuple[bytes, bool]]) -> _Piece:
        """The runs of a piece; adds their texts to those that are spelled."""
        teacher, tokens_T = self._teacher, piece.tokens_T
        special_T = teacher.special_V[tokens_T]
        changes = np.flatnonzero(np.diff(special_T)) + 1
        borders = np.unique(np.concatenate([[0, len(tokens_T)], changes]))
        spans = list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
        written = [span for span in spans if not special_T[span[0]]]
        for start, end in spans:
            if special_T[start]:
                piece.runs += [self._special(piece, at) for at in range(start, end)]
                continue
            first, begins = self._begin_as_whole(piece, start)
            last = (start, end) == written[-1]
            try:
                found = teacher.text_of(tokens_T[start:end], first=first, last=last)
            except KeyError as error:
                raise ColdstillError(
                    f"{piece.where}: the id {error} is none of {teacher.where}"
                ) from error
            added = first and teacher.adds_space(int(tokens_T[start]))
            piece.runs.append(_Run(start, [*map(len, found)], text=len(texts), added=added))
            texts.append((b"".join(found), begins))
        return piece

    def _begin_as_whole(self, piece: _Piece, at: int) -> tuple[bool, bool]:
        """Whether a text begins as a whole text does, for the teacher's tokenizer and for the
        student's: nothing is before it but a begin of text, or special tokens do not matter."""
        first = not any(run.text is not None for run in piece.runs)
        ends = piece.runs[-1].ids if piece.runs else ()
        found = []
        for speller, before, behind in (
            (self._teacher, piece.tokens_T[:at].tolist(), at > 0),
            (self._student, [i for run in piece.runs for i in run.ids], bool(ends)),
        ):
            alone = {*before} <= {speller.id_of(speller.roles.get("bos_token"))}
            found.append((first and alone) or (behind and speller.spaced_after_special))
        return found[0], found[1]

    def _special(self, piece: _Piece, at: int) -> _Run:
        index = int(piece.tokens_T[at])
        ids = self._table.specials.get(index)
        if ids is None:
            name = self._teacher.name_of(index)
            if name == self._teacher.roles.get("unk_token"):
                piece.unknown = f"its token {at} is {name!r}, which stands for unknown text"
                return _Run(at, [1])
            raise ColdstillError(
                f"{piece.where}, token {at}: the special token {name!r} has no counterpart in "
                f"{self._student.where}; say what to write for it (special: {name} = TEXT)"
            )
        return _Run(at, [max(1, len(ids))], ids=ids)

    def _write(
        self,
        piece: _Piece,
        texts: list[tuple[bytes, bool]],
        spellings: list[Spelling],
        known: tuple[NDArray[np.float32], NDArray[np.bool_]],
        counters: tuple[Counter[str], Counter[tuple[int, int]]],
    ) -> tuple[TokenizedDocument, tuple[NDArray[Any], ...]]:
        """A piece in the student's tokens; of each learned token the teacher's position, the size
        of its chunk, the log-probability and the teacher's first token, as in `Rewritten`."""
        counts, pairs = counters
        place, lengths = 0, []
        ids, starts, ends = [np.array(self._prefix, np.int32)], [], []
        shifted: list[int] = []
        unknown = piece.unknown
        for run in piece.runs:
            lengths += run.lengths
            width = sum(run.lengths)
            if run.text is None:
                own = np.arange(len(run.ids), dtype=np.int64)
                ids.append(np.array(run.ids, np.int32))
                starts.append(place + own)
                ends.append(place + own + 1)
                counts["dropped_tokens"] += not run.ids
            else:
                spelling = spellings[run.text]
                ids.append(spelling.ids)
                starts.append(place + spelling.starts)
                ends.append(place + spelling.ends)
                # a text that is not reproduced may also become longer
                counts["lost_bytes"] += max(0, width - int((spelling.ends - spelling.starts).sum()))
                if spelling.added is not run.added:
                    shifted.append(place)
                if spelling.misfit is not None and unknown is None:
                    unknown = self._misfit(texts[run.text][0], spelling.misfit)
            place += width
        tokens_T = np.concatenate(ids)
        document = TokenizedDocument(piece.document, tokens_T, np.zeros(len(tokens_T), np.bool_))
        none = np.zeros(0, np.int32)
        nothing = none.astype(np.int64), none, none.astype(np.float32), none
        if unknown is not None:
            if not self._skip:
                raise ColdstillError(
                    f"{piece.where}: {unknown}; leave its text out of training (unaligned = skip), "
                    "or use another tokenizer"
                )
            counts["skipped_pieces"] += 1
            return document, nothing
        if len(tokens_T) == len(self._prefix):
            return document, nothing
        ends_T = np.cumsum(lengths, dtype=np.int64)
        laid = Laid(ends_T - np.array(lengths, np.int64), ends_T)
        found = chunks_of(laid, Laid(np.concatenate(starts), np.concatenate(ends)))
        if len(found) == 0:
            return document, nothing
        # what predicts the teacher's tokens of each chunk
        logprobs_M, lacking_M = known
        count = int(found.teacher_C[-1] + found.teacher_counts_C[-1])
        rows_T = piece.rows_T[:count]
        known_T = np.zeros(count)
        known_T[rows_T >= 0] = logprobs_M[rows_T[rows_T >= 0]]
        sums_C = np.add.reduceat(known_T, found.teacher_C)
        learned_C = np.add.reduceat(rows_T >= 0, found.teacher_C) == found.teacher_counts_C
        student_C = found.student_C + len(self._prefix)
        learned_C &= found.whole_C & (found.student_counts_C <= LONGEST_CHUNK)
        learned_C &= (sums_C >= LEAST_LOGPROB) & (student_C > 0)
        # behind a space that one side alone has, the tokens of both have other bytes
        same_C = ~np.isin(laid.starts_T[found.teacher_C], shifted)
        theirs_C = piece.tokens_T[found.teacher_C]
        own_C = tokens_T[student_C.clip(max=len(tokens_T) - 1)]  # the last may have no token
        both = np.flatnonzero(found.whole_C & same_C)
        pairs.update(zip(theirs_C[both].tolist(), own_C[both].tolist(), strict=True))
        chosen = np.flatnonzero(learned_C)
        sizes_C, firsts_C = found.student_counts_C[chosen], student_C[chosen]
        from_C = rows_T[found.teacher_C[chosen]]
        known_C = same_C[chosen]
        if len(lacking_M):
            known_C &= ~lacking_M[from_C]
        offsets = np.cumsum(sizes_C) - sizes_C
        total = int(sizes_C.sum())
        document.learned_T[np.repeat(firsts_C - offsets, sizes_C) + np.arange(total)] = True
        rows, sizes = np.full(total, -1, np.int64), np.zeros(total, np.int32)
        logprobs = np.zeros(total, np.float32)
        rows[offsets] = np.where(known_C, from_C, -1)
        sizes[offsets] = np.where(known_C, sizes_C, -sizes_C)
        logprobs[offsets] = np.minimum(sums_C[chosen], 0.0)
        spelled_C = (found.teacher_counts_C[chosen] > 1) & (sizes_C == 1)
        firsts = np.full(total, -1, np.int32)
        firsts[offsets] = np.where(spelled_C, theirs_C[chosen], -1)
        counts["kept_labels"] += int(found.teacher_counts_C[chosen].sum())
        return document, (rows, sizes, logprobs, firsts)

    def _misfit(self, text: bytes, at: int) -> str:
        shown = text[max(0, at - 12) : at + 12].decode("utf-8", errors="replace")
        return f"{self._student.where} does not reproduce its text at byte {at}, near {shown!r}"


def _pieces(sequences: Sequences) -> list[list[_Piece]]:
    """The documents, or pieces of them, of each sequence."""
    found = []
    row = 0
    places = label_places(sequences)
    for index, tokens_T in enumerate(sequences.tokens):
        rows_T = np.full(len(tokens_T), -1, np.int64)
        count = len(sequences.positions[index])
        rows_T[places[row : row + count]] = np.arange(row, row + count)
        row += count
        borders = [*sequences.document_starts[index].tolist(), len(tokens_T)]
        found.append(
            [
                _Piece(
                    int(document),
                    tokens_T[start:end],
                    rows_T[start:end],
                    f"sequence {int(sequences.ids[index])}, document {int(document)}",
                )
                for document, start, end in zip(
                    sequences.document_ids[index], borders[:-1], borders[1:], strict=True
                )
            ]
        )
    return found
