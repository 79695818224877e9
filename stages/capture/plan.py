"""The plan of a capture and the manifest of its store, made before the teacher is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import ColdstillError
from ...data.store.manifest import CorpusIdentity, Manifest, Packing, format_settings
from ...data.store.provenance import Generation
from ...data.store.writer import BLOCK_TOKENS, shard_sequences
from ..models.isolation import recorded
from ..models.vocabulary import tokenizer_identity

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.prepared import CorpusRecord, SequenceFile, Split
    from ...data.schema import Capture, Sequences
    from ...data.store.manifest import TeacherIdentity
    from ...data.store.provenance import Writing
    from ..config import GenerateConfig
    from ..models.inputs import Isolation


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """Everything that decides the store of one split."""

    split: Split
    teacher: TeacherIdentity
    context: int | None
    """Longest input of the teacher; None if it has no limit."""
    tokenizer: Any
    corpus: CorpusRecord
    sequences: SequenceFile
    rows: NDArray[np.int64] | range
    """Indices of the captured sequences in `sequences`, increasing."""
    capture: Capture
    sequence_length: int
    shard_tokens: int
    batch_tokens: int
    codec: str | dict[str, Any]
    """Name of the codec, or a table of its name and settings."""
    store: str | dict[str, Any]
    """Name of the store format, or a table of its name and settings."""
    folder: str | Path
    """Path or address of the store."""
    generate: GenerateConfig | None = None
    """How the teacher answers; None if the sequences are not prompts."""
    other_engine: bool = False
    """Whether a store that another engine began is continued."""
    written: Writing | None = None
    """The student that wrote the sequences; None if they are of the corpus."""

    def most_tokens(self, sequences: Sequences) -> NDArray[np.int64]:
        """[N] tokens of each sequence, or of each prompt with its longest possible answer."""
        lengths_N = sequences.tokens.lengths
        if self.generate is None:
            return lengths_N
        return np.minimum(lengths_N + self.generate.max_new_tokens, self.sequence_length)


def chosen_rows(available: int, wanted: int | None, seed: int) -> NDArray[np.int64] | range:
    """Indices of the sequences to capture: all, as a range, or a seeded sample in corpus order."""
    if wanted is None or wanted >= available:
        return range(available)
    random = np.random.Generator(np.random.PCG64([seed, 1]))
    return np.sort(random.choice(available, wanted, replace=False))


def make_manifest(plan: CapturePlan, isolation: Isolation) -> Manifest:
    """The manifest of the store; depends on the arguments only."""
    tokenizer = tokenizer_identity(plan.tokenizer)
    expect_capturable(plan.capture, tokenizer.size, plan.sequence_length, plan.context)
    split = plan.corpus.splits[plan.split]
    per_shard = shard_sequences(len(plan.rows), plan.sequence_length, plan.shard_tokens)
    settings = format_settings(plan.codec, plan.store, tokenizer.size, plan.capture)
    return Manifest(
        teacher=plan.teacher,
        tokenizer=tokenizer,
        corpus=CorpusIdentity(
            fingerprint=split.content, split=plan.split, documents=split.documents
        ),
        packing=Packing(
            sequence_length=plan.sequence_length,
            together=plan.corpus.together,
            isolation=recorded(isolation),
            separator=tuple(plan.corpus.separator),
            fingerprint=split.packing,
        ),
        capture=plan.capture,
        sequences=len(plan.rows),
        shard_sequences=per_shard,
        block_sequences=min(per_shard, max(1, BLOCK_TOKENS // plan.sequence_length)),
        codec=settings["codec"],
        store=settings["store"],
        generated=None if plan.generate is None else Generation(**asdict(plan.generate)),
        written=plan.written,
    )


def expect_capturable(
    capture: Capture, size: int, sequence_length: int, longest: int | None
) -> None:
    """Refuse a head and tail larger than the vocabulary, and sequences longer than the context.

    size     tokens of the vocabulary
    longest  context of the teacher; None if it has no limit
    """
    if capture.head > size:
        raise ColdstillError(
            f"logits.head: {capture.head} is more than the vocabulary's {size} tokens"
        )
    if capture.head == size and capture.tail:
        raise ColdstillError(
            f"logits.tail: a head of {size} is the whole vocabulary, nothing is left to sample; "
            "set tail = 0"
        )
    if longest is not None and sequence_length > longest:
        raise ColdstillError(
            f"corpus.sequence_length: {sequence_length} is more than the teacher's context of "
            f"{longest}; choose at most {longest}"
        )
