"""Estimates the size of a prepared corpus from a sample of its documents.

Small sources are read whole; the beginning of a large source stands for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.corpus.sample import sample, spread
from ...data.errors import ColdstillError
from ...data.prepared import SPLITS, TokenizedDocument
from .tokenize_documents import SplitPacker, document_tokenizer, is_kept

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.corpus.document import BadRowError, Document
    from ...data.corpus.sample import Sample
    from ...data.corpus.sources import Source
    from ...data.prepared import Split
    from ..config import CorpusConfig
    from .tokenize_documents import Pieces

_Tokenize = Callable[
    [Sequence["Document"], int, Callable[["BadRowError"], None]],
    list[tuple["Document", TokenizedDocument]],
]
BYTES_PER_TOKEN = 4
"""Assumed size of a token if the tokenizer does not exist yet."""
_SOURCES = 64
_DOCUMENTS = 512
_BYTES = 1 << 20
"""Bytes that are read of all sources together, which takes about a second."""
_SMALLEST = 1 << 13
"""Smallest number of bytes that are read of a source."""


class NoEstimateError(ColdstillError):
    """The corpus cannot be sampled yet, although it may be possible to prepare it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated size of a prepared corpus."""

    documents: int
    """Documents in the sample."""
    is_whole: bool
    """Whether the sample is the whole corpus."""
    sequences: dict[Split, float]
    tokens: dict[Split, float]
    positions: dict[Split, float]


def estimate(
    config: CorpusConfig, sources: Sequence[Source], folder: Path | None, *, prompts: bool
) -> Estimate:
    """Tokenise and pack a sample of a corpus.

    folder   folder of the tokenizer; if None, each token is assumed to take four bytes
    prompts  whether the corpus holds prompts that the teacher answers

    Raises
        NoEstimateError: the tokenizer cannot be loaded quickly, or no source can be sampled
        ColdstillError: the corpus cannot be prepared, for example because a source is damaged or
            chats have no chat template
    """
    tokenize: _Tokenize = _by_size
    if folder is not None:
        tokenize = document_tokenizer(_tokenizer(folder), config, prompts=prompts)
    columns = config.columns.for_prompts() if prompts else config.columns
    chosen = spread(sources, _SOURCES)
    count = max(8, _DOCUMENTS // max(1, len(chosen)))
    limit = max(_SMALLEST, _BYTES // max(1, len(chosen)))
    size = _Size(config, prompts=prompts)
    read, fault, is_whole = 0, "", len(chosen) == len(sources)
    for source in chosen:
        found = sample(source, columns, count, limit)
        is_whole = is_whole and found is not None and found.share == 1.0
        if found is not None:
            read += source.bytes
            fault = fault or found.fault
            size.add(tokenize, found)
    if not size.documents:
        raise NoEstimateError(fault or "no document of the corpus can be sampled")
    all_bytes = sum(source.bytes for source in sources)
    return size.finish(1.0 if is_whole else all_bytes / max(1, read), is_whole=is_whole)


class _Size:
    """Counts the tokens and sequences of a sample."""

    def __init__(self, config: CorpusConfig, *, prompts: bool) -> None:
        self._holdout, self._prompts = config.holdout, prompts
        self.documents = 0
        self._packer = SplitPacker(config, together=config.pack, prompts=prompts)
        self._sampled: dict[str, float] = {"tokens": 0, "positions": 0}
        self._weighted: dict[str, float] = {"tokens": 0, "positions": 0}
        self._packed = {split: Counter[str]() for split in SPLITS}

    def add(self, tokenize: _Tokenize, found: Sample) -> None:
        kept = [d for d in found.documents if is_kept(d, prompts=self._prompts)]
        self.documents += len(found.documents)
        for document, tokenized in tokenize(kept, 0, lambda bad: None):
            for name, amount in _amounts(tokenized).items():
                self._sampled[name] += amount
                self._weighted[name] += amount / found.share
            split, packed = self._packer.add(document, tokenized)
            self._count(split, packed)

    def finish(self, scale: float, *, is_whole: bool) -> Estimate:
        """The estimate for `scale` times the bytes of the sampled sources."""
        for split, packed in self._packer.finish():
            self._count(split, list(packed))
        expected = {
            name: self._expected(name, scale, is_whole=is_whole)
            for name in ("sequences", "tokens", "positions")
        }
        return Estimate(self.documents, is_whole, **expected)

    def _expected(self, name: str, scale: float, *, is_whole: bool) -> dict[Split, float]:
        if is_whole:
            return {split: float(counts[name]) for split, counts in self._packed.items()}
        # sequences are assumed to be as full as those of the sample
        by = "positions" if name == "positions" else "tokens"
        scale *= self._weighted[by] / max(1, self._sampled[by])
        count = scale * sum(counts[name] for counts in self._packed.values())
        held_out = count * self._holdout
        return {"train": count - held_out, "heldout": held_out}

    def _count(self, split: Split, packed: Sequence[Pieces]) -> None:
        self._packed[split]["sequences"] += len(packed)
        for pieces in packed:
            for piece in pieces:
                self._packed[split].update(_amounts(piece))


def _amounts(piece: TokenizedDocument) -> dict[str, int]:
    return {"tokens": len(piece.tokens_T), "positions": int(piece.learned_T[1:].sum())}


def _by_size(
    documents: Sequence[Document], first: int, skip: Callable[[BadRowError], None]
) -> list[tuple[Document, TokenizedDocument]]:
    """Tokenise with four bytes per token; the learned tokens are at the end of a document."""
    found = []
    for document in documents:
        turns = (m for m in document.messages if m["role"] == "assistant")
        answers = replace(document, prompt="", messages=tuple(turns), tools=(), documents=())
        tokens = np.zeros(-(-document.size // BYTES_PER_TOKEN), np.int32)
        learned = np.arange(len(tokens)) >= len(tokens) + -answers.size // BYTES_PER_TOKEN
        found.append((document, TokenizedDocument(first, tokens, learned)))
    return found


def _tokenizer(folder: Path) -> Any:
    """The tokenizer, loaded in seconds because the library of its model is not."""
    from transformers import PreTrainedTokenizerFast

    from ..libraries import asking

    try:
        with asking("transformers", "load the tokenizer quickly", where=str(folder)):
            return PreTrainedTokenizerFast.from_pretrained(folder)
    except ColdstillError as error:
        raise NoEstimateError(str(error)) from error
