"""Writes a store again in the tokens of another tokenizer, for a student that has these tokens.

The store is read twice: once to align every document, so that nothing is written if one cannot be
aligned, and once to write. Tokenizers that differ in nothing but their ids keep every number.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ..alignment import labels
from ..errors import ColdstillError
from ..files import json_sha256
from ..ragged import Ragged
from ..retokenized.continued import Continuations
from ..retokenized.documents import Rewriter
from ..retokenized.drawn import drawn_branches
from ..retokenized.known import KnownTokens
from ..retokenized.mapping import Shares, map_tokens, relabelling
from ..retokenized.records import RecordMap, mapped_capture, relabelled
from ..retokenized.spelling import Speller
from ..schema import Block, sequence_hash
from ..store.layout import TOKENIZER
from ..store.manifest import TokenizerIdentity
from ..store.reader import open_store
from ..store.retokenized import MASS_BINS, Ambiguous, Retokenized, Unaligned
from . import Notify, no_progress
from .rewrite import open_original, reformatted, rewrite, rows_from

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..schema import Sequences
    from ..store.manifest import Manifest
    from ..store.reader import StoreReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What is decided where two tokenizers do not agree."""

    ambiguous: Ambiguous = "split"
    """What becomes of the probability of a teacher's token that may be the beginning of a longer
    token of the student: it is split as the texts of the store go on, goes to the student's token
    for its bytes, or stays in the bucket."""
    unaligned: Unaligned = "refuse"
    """What happens with a text that the student's tokenizer does not reproduce byte by byte: it is
    refused, or nothing is learned of it."""
    special: Mapping[str, str] = field(default_factory=dict)
    """What the student reads for special tokens of the teacher, by their names."""
    branches: float = 0.25
    """Most branches for each token of a sequence: words beside the text that the teacher drew and
    that the student spells with several tokens (`data/branches.py`); 0 for none."""


def retokenize(
    path: str,
    to: str,
    tokenizer: Path,
    decisions: Decisions | None = None,
    *,
    named: str = "the tokenizer",
    notify: Notify = no_progress,
) -> Manifest:
    """Write a store in the tokens of a tokenizer.

    tokenizer  its folder
    named      its name in messages

    Raises
        ColdstillError: as `rewrite.convert`; the store has no tokenizer, no log-probabilities of
            labels, or the tokens of another student; the bytes of a tokenizer's tokens cannot be
            known; a text or a special token cannot be aligned (where)
    """
    decisions = decisions or Decisions()
    source = open_original(path, to)
    teacher = _teacher_of(source, path)
    student = Speller(tokenizer, named)
    old = source.manifest
    if student.fingerprint == teacher.fingerprint:
        return rewrite(to, reformatted(old, None, None), [source], rows_from(source), notify)
    work = _work(source, path, teacher, student, decisions)
    blocks = source.batches(old.block_sequences)
    manifest = _manifest(source, student, work, _aligned(source, blocks, work, notify))
    return rewrite(to, manifest, [source], rows_from(source), notify, work.block, tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What some sequences of a store become in the tokens of another tokenizer."""

    positions: float
    """Supervised positions for each one of the store."""
    bytes_per_position: float
    """Bytes of each of them."""
    seconds: float
    """Time for each position of the store."""


def sample(
    path: str, tokenizer: Path, decisions: Decisions, tokens: int, *, named: str = "the tokenizer"
) -> Sampled:
    """Write some sequences of a store in the tokens of another tokenizer, to a temporary folder.

    tokens  tokens of the sample, about

    Raises
        ColdstillError: as `retokenize`
    """
    source = open_store(path)
    teacher, student = _teacher_of(source, path), Speller(tokenizer, named)
    work = _work(source, path, teacher, student, decisions)
    old = source.manifest
    count = max(1, min(len(source), tokens // old.packing.sequence_length))
    rows = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
    started = time.perf_counter()
    block = source.read(rows)
    made = _manifest(source, student, work, _aligned(source, [block], work, no_progress))
    made = replace(made, sequences=len(rows))
    with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
        rewrite(folder, made, [source], rows_from(source, rows), no_progress, work.block, tokenizer)
        new = open_store(folder).totals
    before = max(1, len(block.targets))
    return Sampled(
        positions=new.positions / before,
        bytes_per_position=new.bytes / max(1, new.positions),
        seconds=(time.perf_counter() - started) / before,
    )


def _teacher_of(source: StoreReader, path: str) -> Speller:
    """The tokenizer of a store; raises ColdstillError if its record cannot be mapped."""
    old = source.manifest
    if old.capture.chunks:
        raise ColdstillError(
            f"{path}: holds the tokens of a student, not of its teacher; give the store that it "
            "was made from"
        )
    if not old.capture.mass:
        raise ColdstillError(
            f"{path}: was imported without the mass outside the head, without which its head "
            "cannot be mapped to other tokens"
        )
    estimated = () if old.imported is None else old.imported.estimated
    if old.capture.guessed_labels or "label" in estimated:
        raise ColdstillError(
            f"{path}: was written without the log-probabilities of its labels, so no chunk of text "
            "has one; write it again with label_logprob"
        )
    if not source.place.exists(TOKENIZER):
        raise ColdstillError(f"{path}: has no tokenizer, so the bytes of its tokens are not known")
    teacher = Speller(source.tokenizer_folder(), f"the tokenizer of {path}")
    if old.tokenizer.fingerprint not in ("", teacher.fingerprint):
        raise ColdstillError(
            f"{source.place.path(TOKENIZER)}: not the tokenizer that the manifest names; run "
            "coldstill store verify"
        )
    return teacher


def _work(
    source: StoreReader, path: str, teacher: Speller, student: Speller, decisions: Decisions
) -> _Relabelling | _Mapping:
    """How the blocks of a store are written again."""
    ids_V = relabelling(teacher, student)
    if ids_V is not None:
        return _Relabelling(ids_V)
    work = _Mapping(teacher, student, source.manifest, decisions)
    if decisions.ambiguous == "bucket" and source.manifest.capture.tail:
        raise ColdstillError(
            f"{path}: ambiguous = bucket: needs a record without samples, which alone has a "
            "bucket; map the tokens, or take the samples out: coldstill store shrink --tail 0"
        )
    return work


class _Relabelling:
    """Other ids for the same tokens."""

    def __init__(self, ids_V: NDArray[np.int32]) -> None:
        self._ids_V = ids_V

    def capture(self, old: Manifest) -> Manifest:
        return old

    def separator(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._ids_V[list(ids)].tolist())

    def measure(self, block: Block) -> Sequences:
        return self.block(block).sequences

    def measured(self) -> Retokenized | None:
        return None

    def block(self, block: Block) -> Block:
        sequences = block.sequences
        tokens = Ragged(self._ids_V[sequences.tokens.values], sequences.tokens.offsets)
        rows = zip(tokens, sequences.document_starts, sequences.positions, strict=True)
        hashes = np.array([sequence_hash(*row) for row in rows], np.uint64)
        return Block(
            sequences=replace(sequences, tokens=tokens, hashes=hashes),
            targets=relabelled(block.targets, self._ids_V),
            capture=block.capture,
        )


class _Mapping:
    """Other tokens."""

    def __init__(
        self, teacher: Speller, student: Speller, old: Manifest, decisions: Decisions
    ) -> None:
        self._old, self._decisions = old, decisions
        self._teacher, self._student = teacher, student
        self._table = map_tokens(teacher, student, decisions.special)
        self._capture = mapped_capture(
            old.capture, teacher.size, student.size, branches=decisions.branches > 0
        )
        self._rewriter = Rewriter(teacher, student, self._table, skip=decisions.unaligned == "skip")
        self._known = self._mapped_by(None)
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._counts: Counter[str] = Counter()
        self._positions, self._ambiguous, self._unmapped, self._spelled = 0, 0.0, 0.0, 0.0
        self._masses_V = np.zeros(teacher.size)
        self._bins = np.zeros(MASS_BINS, np.int64)
        self._longest = 0

    def _mapped_by(self, shares: Shares | None) -> KnownTokens:
        bucket, old = self._decisions.ambiguous == "bucket", self._old.capture
        return KnownTokens(self._table, old, self._capture, bucket=bucket, shares=shares)

    def capture(self, old: Manifest) -> Manifest:
        return replace(old, capture=self._capture)

    def separator(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        found: list[int] = []
        text = b""
        for index in (*ids, None):
            if index is not None and not self._teacher.special_V[index]:
                text += self._teacher.bytes_V[index] or b""
                continue
            found += self._student.spell([(text, False)])[0].ids.tolist()
            text = b""
            found += self._table.specials.get(index, ()) if index is not None else ()
        return tuple(found)

    def measure(self, block: Block) -> Sequences:
        """The new sequences; adds what is measured of them."""
        if not np.isfinite(block.targets.label_logprob).all():
            raise ColdstillError(
                f"sequence {int(block.sequences.ids[0])} and those after it: labels without a "
                "log-probability, of which no chunk can be made; capture the store again"
            )
        lacking = self._known.lacking(block.targets)
        found = self._rewriter(block.sequences, block.targets.label_logprob, lacking)
        masses = self._known.masses(block.targets.take(found.rows_M[found.rows_M >= 0]))
        self._longest = max(self._longest, int(found.sequences.tokens.lengths.max()))
        places = (masses.ambiguous_D * MASS_BINS).astype(np.int64).clip(0, MASS_BINS - 1)
        self._bins += np.bincount(places, minlength=MASS_BINS)
        self._positions += len(places)
        self._ambiguous += float(masses.ambiguous_D.sum())
        self._unmapped += float(masses.unmapped_D.sum())
        self._spelled += float(masses.spelled_D.sum())
        self._masses_V += self._known.sums(block.targets)
        self._counts.update(found.counts)
        self._pairs.update(found.pairs)
        return found.sequences

    def measured(self) -> Retokenized:
        """What was measured. Called after the last block was, and before one is mapped."""
        if self._decisions.ambiguous == "split":
            self._known = self._mapped_by(Shares.counted(self._table, self._pairs))
        beginnings, size = self._table.beginnings, self._student.size
        self._continuations = Continuations(beginnings, self._masses_V, size)
        return Retokenized(
            fingerprint=self._teacher.fingerprint,
            size=self._teacher.size,
            ambiguous=self._decisions.ambiguous,
            unaligned=self._decisions.unaligned,
            branches=self._decisions.branches,
            positions=self._positions,
            ambiguous_mass=self._ambiguous,
            ambiguous_bins=tuple(self._bins.tolist()),
            unmapped_mass=self._unmapped,
            spelled_mass=self._spelled if self._capture.branches else 0.0,
            counts=dict(sorted(self._counts.items())),
        )

    def block(self, block: Block) -> Block:
        lacking = self._known.lacking(block.targets)
        found = self._rewriter(block.sequences, block.targets.label_logprob, lacking)
        table, old, rows_D = self._table, self._old.capture, found.rows_M[found.rows_M >= 0]
        records, sequences = block.targets.take(rows_D), found.sequences
        targets = RecordMap(self._known, self._continuations, table, old, self._capture)(
            records,
            sequences,
            labels(sequences),
            found.sizes_M,
            found.logprobs_M,
            found.firsts_M,
            labels(block.sequences)[rows_D],
        )
        if self._capture.branches:
            begins, share = np.flatnonzero(found.rows_M >= 0), self._decisions.branches
            branches = drawn_branches(
                records, old, table, self._known.spelled(), sequences, begins, share, self._longest
            )
            sequences = replace(sequences, branches=branches)
        return Block(sequences=sequences, targets=targets, capture=self._capture)


@dataclass(frozen=True, slots=True)
class _Aligned:
    longest: int
    """Most tokens of a sequence."""
    fingerprint: str
    """SHA-256 over all sequences."""


def _aligned(
    source: StoreReader, blocks: Iterable[Block], work: _Relabelling | _Mapping, notify: Notify
) -> _Aligned:
    """Align every document of some blocks of a store; writes nothing."""
    digest, longest, done, positions = hashlib.sha256(), 2, 0, 0
    for block in blocks:
        try:
            sequences = work.measure(block)
        except ColdstillError as error:
            raise ColdstillError(f"{source.place}: {error}") from error
        digest.update(sequences.hashes.astype("<u8").tobytes())
        longest = max(longest, int(sequences.tokens.lengths.max()))
        positions += len(sequences.positions.values)
        done += len(block)
        notify("align", done, len(source))
    if positions == 0:
        raise ColdstillError(
            f"{source.place}: no supervised text has a border that both tokenizers share, so "
            "nothing could be learned"
        )
    return _Aligned(longest, digest.hexdigest())


def _manifest(
    source: StoreReader, student: Speller, work: _Relabelling | _Mapping, aligned: _Aligned
) -> Manifest:
    old = source.manifest
    # what the codec has learned are ids of the teacher
    codec = {key: value for key, value in old.codec.items() if key != "frequent"}
    parts = tuple(
        replace(part, packing=json_sha256([part.packing, student.fingerprint]))
        for part in old.parts
    )
    made = replace(
        work.capture(old),
        codec=codec,
        tokenizer=TokenizerIdentity(fingerprint=student.fingerprint, size=student.size),
        packing=replace(
            old.packing,
            sequence_length=aligned.longest,
            separator=work.separator(old.packing.separator),
            fingerprint=aligned.fingerprint,
        ),
        parts=parts,
        retokenized=work.measured(),
    )
    if isinstance(work, _Relabelling):
        made = replace(
            made, packing=replace(made.packing, sequence_length=old.packing.sequence_length)
        )
    return reformatted(made, None, None)
