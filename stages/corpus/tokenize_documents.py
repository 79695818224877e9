"""Tokenises documents and prompts, and marks the tokens that are to be learned.

Every document becomes one text with spans of characters to learn: all of a plain text, the
completion of a pair, the assistant's turns of a chat. A token is learned if it covers a character
of a span. One exception: a token that begins in the header of a chat turn and shares only white
space with the turn belongs to the header.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.corpus.document import BadRowError, is_held_out, refuse
from ...data.errors import ColdstillError
from ...data.prepared import SPLITS, Packer, TokenizedDocument
from ..models.vocabulary import left_out_in
from .render_chat import ChatRenderer, RenderedChat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from ...data.corpus.document import Document
    from ...data.prepared import Split
    from ..config import CorpusConfig
    from .chat_template import Spans

    Pieces = list[TokenizedDocument]
    """The pieces of documents in one sequence."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a document."""

    document: Document
    text: str
    learned: Spans | None
    """The spans to learn; None means the whole text."""
    closed: bool
    """Whether the chat template has written all special tokens, so that none are added."""


class DocumentTokenizer:
    """Tokenises batches of documents with the threads of the tokenizer."""

    separator: tuple[int, ...] = ()
    """Ids that are added after each document that is not a chat."""

    def __init__(self, tokenizer: Any, config: CorpusConfig) -> None:
        """Tokenise the separator."""
        self._tokenizer = tokenizer
        self._as_chat = config.as_chat
        self._chats = ChatRenderer(tokenizer)
        self.counts: Counter[str] = Counter()
        """Differences between documents and their rows, by their names in a record's counts."""
        self._length = config.sequence_length
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if reason := left_out_in(tokenizer, config.separator or ""):
            raise ColdstillError(f"corpus.separator: {reason}")
        self._choose_separator(config.separator)

    def __call__(
        self,
        documents: Sequence[Document],
        first_index: int,
        skip: Callable[[BadRowError], None] = refuse,
    ) -> list[tuple[Document, TokenizedDocument]]:
        """Tokenise documents; those that are not skipped are numbered from `first_index`.

        skip  called with each bad row: a chat that the template cannot render, a prompt that
              leaves no room for its answer
        """
        texts: list[Rendered] = []
        for document in documents:
            try:
                text = self._render(document)
                if reason := left_out_in(self._tokenizer, text.text):
                    raise BadRowError("rowless_tokens", document.where, reason)
                texts.append(text)
            except BadRowError as bad:
                skip(bad)
        found: list[tuple[Document, TokenizedDocument]] = []
        for text, encoding in zip(texts, self._encode(texts), strict=True):
            try:
                ids, learned = self._finish(text, encoding)
            except BadRowError as bad:
                skip(bad)
                continue
            index = first_index + len(found)
            tokens = np.array(ids, dtype=np.int32)
            found.append((text.document, TokenizedDocument(index, tokens, learned)))
        return found

    def _choose_separator(self, separator: str | None) -> None:
        self._has_end = True
        if separator is None:
            end = self._tokenizer.eos_token_id
            self._has_end = end is not None
            self.separator = () if end is None else (int(end),)
        else:
            ids = self._backend.encode(separator, add_special_tokens=False).ids
            self.separator = tuple(ids)
            if separator and not ids:
                raise ColdstillError(
                    f"corpus.separator: the tokenizer has no tokens for {separator!r}"
                )

    def _encode(self, texts: Sequence[Rendered]) -> list[Any]:
        encodings: list[Any] = [None] * len(texts)
        for closed in (False, True):
            rows = [i for i, text in enumerate(texts) if text.closed is closed]
            batch = [texts[i].text for i in rows]
            found = self._backend.encode_batch(batch, add_special_tokens=not closed)
            for row, encoding in zip(rows, found, strict=True):
                encodings[row] = encoding
        return encodings

    def _finish(self, text: Rendered, encoding: Any) -> tuple[list[int], NDArray[np.bool_]]:
        """The ids of a document with its separator, and [T] whether each of them is learned."""
        ids = encoding.ids
        learned = np.ones(len(ids), np.bool_)
        if text.learned is not None:
            learned = _covers(encoding.offsets, text)
        if not text.closed and (ends := len(self.separator)):
            if tuple(ids[-ends:]) == self.separator:
                learned[-ends:] = True  # added by the tokenizer, so it covers no characters
            else:
                ids = [*ids, *self.separator]
                learned = np.concatenate([learned, np.ones(ends, np.bool_)])
        before = int(learned.argmax()) if learned.any() else 0
        if before >= self._length:  # the answer would be in a later piece, without the prompt
            raise self._too_long(text.document.where, before)
        return ids, learned

    def _too_long(self, where: str, tokens: int) -> BadRowError:
        return BadRowError(
            "too_long_prompts",
            where,
            f"its prompt of {tokens} tokens leaves no room for an answer in sequences of "
            f"{self._length}; shorten it, raise corpus.sequence_length",
        )

    def _render(self, document: Document) -> Rendered:
        if self._is_chat(document):
            return self._chat(document, self._chats.render(document.as_chat()))
        if not self._has_end:
            raise ColdstillError(
                "corpus.separator: the tokenizer has no end-of-text token to put after a text "
                f'({document.where}); set a text to put there, or "" for nothing'
            )
        if not document.prompt:
            return Rendered(document, document.text, None, closed=False)
        whole = document.prompt + document.text
        return Rendered(document, whole, [(len(document.prompt), len(whole))], closed=False)

    def _is_chat(self, document: Document) -> bool:
        """Whether the chat template writes this document."""
        if document.messages or not document.prompt:
            return bool(document.messages)
        has_template = bool(self._tokenizer.chat_template)
        if self._as_chat and not has_template:
            raise ColdstillError(
                "corpus.as_chat: the tokenizer has no chat template to write prompts and "
                "completions with; use a chat model's tokenizer or leave the key out"
            )
        self.counts["untemplated_pairs"] += has_template and not self._as_chat
        return self._as_chat

    def _chat(self, document: Document, chat: RenderedChat) -> Rendered:
        self.counts.update(chat.counts)
        self.counts["templated_pairs"] += not document.messages
        return Rendered(document, chat.text, chat.learned, closed=True)


def _covers(offsets: list[tuple[int, int]], text: Rendered) -> NDArray[np.bool_]:
    """[T] whether each token covers a character to learn."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    covered = np.zeros(len(begin), np.bool_)
    for first, last in text.learned or ():
        visible = first
        if text.closed:
            turn = text.text[first:last]
            visible += len(turn) - len(turn.lstrip())
        covered |= (begin < last) & ((begin >= first) | (end > visible))
    return covered


class PromptTokenizer(DocumentTokenizer):
    """Tokenises only the part of each document that the teacher is to answer.

    This is the prompt of a pair, or a chat up to its last turn that is not the assistant's. No
    token is learned. A plain text is refused, because it is not a prompt.
    """

    def _choose_separator(self, separator: str | None) -> None:
        self._has_end = True  # the answer follows a prompt, so no separator is needed

    def _render(self, document: Document) -> Rendered:
        if self._is_chat(document):
            return self._chat(document, self._chats.ask(document.as_chat()))
        if not document.prompt:
            raise ColdstillError(
                f"{document.where}: a text, but teacher.generate needs prompts or chats; leave it "
                "out of corpus.files, or map its column with corpus.columns.prompt"
            )
        return Rendered(document, document.prompt, [], closed=False)

    def _finish(self, text: Rendered, encoding: Any) -> tuple[list[int], NDArray[np.bool_]]:
        ids, added = list(encoding.ids), encoding.special_tokens_mask
        # an end token that the tokenizer adds would end the answer before it begins
        if ids and added[-1] and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()
        where = text.document.where
        if not ids:
            raise BadRowError("empty_prompts", where, "its prompt has no tokens; give it some text")
        if len(ids) >= self._length:
            raise self._too_long(where, len(ids))
        return ids, np.zeros(len(ids), np.bool_)


def document_tokenizer(tokenizer: Any, config: CorpusConfig, *, prompts: bool) -> DocumentTokenizer:
    """The tokeniser of a corpus: of prompts for the teacher, or of documents to learn from."""
    return (PromptTokenizer if prompts else DocumentTokenizer)(tokenizer, config)


def split_of(document: Document, holdout: float) -> Split:
    """The split of a document, which depends on its content alone."""
    return "heldout" if is_held_out(document.digest(), holdout) else "train"


def is_kept(document: Document, *, prompts: bool) -> bool:
    """Whether a document is used; a prompt for the teacher needs no completion."""
    return not document.is_empty or (prompts and bool(document.prompt))


class SplitPacker:
    """Packs the documents of each split into sequences; a prompt stays a separate sequence."""

    def __init__(self, config: CorpusConfig, *, together: bool, prompts: bool) -> None:
        self._holdout = config.holdout
        self._packers = {
            split: Packer(config.sequence_length, together=together)
            for split in (() if prompts else SPLITS)
        }

    def add(self, document: Document, tokenized: TokenizedDocument) -> tuple[Split, list[Pieces]]:
        """Add a document; returns its split and the sequences that are now full."""
        split = split_of(document, self._holdout)
        if not self._packers:
            return split, [[tokenized]]
        return split, list(self._packers[split].add(tokenized))

    def finish(self) -> Iterable[tuple[Split, Iterator[Pieces]]]:
        """The sequences that are not full, by split."""
        return ((split, packer.finish()) for split, packer in self._packers.items())

    @property
    def counts(self) -> Counter[str]:
        """Numbers of cut documents and of pieces without a supervised token."""
        names = ("cut_documents", "unlearnable_pieces")
        return Counter({n: sum(p.counts[n] for p in self._packers.values()) for n in names})
