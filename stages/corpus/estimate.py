"""How large a corpus will be once it is prepared, from a sample of it.

Whole sources are read where they are small; of others the beginning stands for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.corpus import is_held_out
from ...data.corpus.sample import sample, spread
from ...data.errors import ColdstillError
from ...data.packing import Packer, TokenizedDocument
from ...data.prepared import SPLITS
from .tokenize_documents import DocumentTokenizer
from .tokenize_prompts import PromptTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.corpus import BadRowError, Document, Source
    from ...data.corpus.sample import Sample
    from ...data.prepared import Split
    from ..config import CorpusConfig

_Tokenize = Callable[
    [Sequence["Document"], int, Callable[["BadRowError"], None]],
    list[tuple["Document", TokenizedDocument]],
]
BYTES_PER_TOKEN = 4
"""A rule of thumb for text whose tokenizer is not there."""
_SOURCES = 64
_DOCUMENTS = 512
_BYTES = 1 << 20
"""Of all sources together: this takes about a second."""
_SMALLEST = 1 << 13
"""Bytes of a source that are always looked at."""


class NoEstimateError(ColdstillError):
    """Nothing of the corpus can be looked at yet; it may be prepared all the same."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sample lets expect of a prepared corpus."""

    documents: int
    """In the sample."""
    is_whole: bool
    """Whether the sample is the whole corpus."""
    sequences: dict[Split, float]
    tokens: dict[Split, float]
    positions: dict[Split, float]


def estimate(
    config: CorpusConfig, sources: Sequence[Source], folder: Path | None, *, prompts: bool
) -> Estimate:
    """Tokenise and pack a sample of a corpus.

    folder   where the tokenizer lies; None where it is not there yet, so that each token is taken
             for four bytes
    prompts  what is counted are prompts that the teacher answers

    Raises
        NoEstimateError: the tokenizer cannot be loaded quickly, or no source can be looked at
        ColdstillError: the corpus cannot be prepared: a source is damaged, say, or there are chats
            and no chat template
    """
    kind = PromptTokenizer if prompts else DocumentTokenizer
    tokenize = _rule if folder is None else kind(_tokenizer(folder), config)
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
        raise NoEstimateError(fault or "no document of the corpus can be looked at")
    all_bytes = sum(source.bytes for source in sources)
    return size.finish(1.0 if is_whole else all_bytes / max(1, read), is_whole=is_whole)


class _Size:
    """Sums over a sample, and the sequences that it makes."""

    def __init__(self, config: CorpusConfig, *, prompts: bool) -> None:
        self._config, self._prompts = config, prompts
        self.documents = 0
        self._packers = {
            split: Packer(config.sequence_length, together=config.pack and not prompts)
            for split in SPLITS
        }
        self._sample: dict[str, float] = {"tokens": 0, "positions": 0}
        self._weighted: dict[str, float] = {"tokens": 0, "positions": 0}
        self._packed = {split: Counter[str]() for split in SPLITS}

    def add(self, tokenize: _Tokenize, found: Sample) -> None:
        """Tokenise and pack what was found of one source."""
        full = [d for d in found.documents if not d.is_empty or (self._prompts and d.prompt)]
        self.documents += len(found.documents)
        for document, made in tokenize(full, 0, lambda bad: None):
            learned = int(made.learned_T[1:].sum())
            for name, amount in (("tokens", len(made.tokens_T)), ("positions", learned)):
                self._sample[name] += amount
                self._weighted[name] += amount / found.share
            held_out = is_held_out(document.digest(), self._config.holdout)
            split: Split = "heldout" if held_out else "train"
            packed = [[made]] if self._prompts else self._packers[split].add(made)
            for pieces in packed:
                self._count(split, pieces)

    def finish(self, more: float, *, is_whole: bool) -> Estimate:
        """The estimate; the whole corpus is so many times as large as what was looked at."""
        for split, packer in self._packers.items():
            for pieces in packer.finish():
                self._count(split, pieces)
        expected = {name: self._expected(name, more, is_whole=is_whole) for name in _COUNTED}
        return Estimate(self.documents, is_whole, *(expected[name] for name in _COUNTED))

    def _expected(self, name: str, more: float, *, is_whole: bool) -> dict[Split, float]:
        if is_whole:
            return {split: float(counts[name]) for split, counts in self._packed.items()}
        # sequences are as full as those of the sample
        by = "positions" if name == "positions" else "tokens"
        scale = more * self._weighted[by] / max(1, self._sample[by])
        count = scale * sum(counts[name] for counts in self._packed.values())
        held_out = count * self._config.holdout
        return {"train": count - held_out, "heldout": held_out}

    def _count(self, split: Split, pieces: Sequence[TokenizedDocument]) -> None:
        counts = self._packed[split]
        counts["sequences"] += 1
        for piece in pieces:
            counts["tokens"] += len(piece.tokens_T)
            counts["positions"] += int(np.count_nonzero(piece.learned_T[1:]))


_COUNTED = ("sequences", "tokens", "positions")


def _rule(
    documents: Sequence[Document], first: int, skip: Callable[[BadRowError], None]
) -> list[tuple[Document, TokenizedDocument]]:
    """What a tokenizer of four bytes a token would give; what is learned stands at the end."""
    found = []
    for document in documents:
        said = (m for m in document.messages if m["role"] == "assistant")
        answers = replace(document, prompt="", messages=tuple(said), tools=(), documents=())
        tokens = np.zeros(-(-document.size // BYTES_PER_TOKEN), np.int32)
        learned = np.arange(len(tokens)) >= len(tokens) + -answers.size // BYTES_PER_TOKEN
        found.append((document, TokenizedDocument(first, tokens, learned)))
    return found


def _tokenizer(folder: Path) -> Any:
    """The tokenizer without the library that would load its model, too: a matter of seconds."""
    from transformers import PreTrainedTokenizerFast

    from ..libraries import asking

    try:
        with asking("transformers", "load the tokenizer quickly", where=str(folder)):
            return PreTrainedTokenizerFast.from_pretrained(folder)
    except ColdstillError as error:
        raise NoEstimateError(str(error)) from error
