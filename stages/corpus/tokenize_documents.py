"""Documents to token ids, and which of those ids are to be learned.

Everything becomes one text with spans of characters: a plain document is learned whole, of a prompt
with completion only the completion, of a chat only what the assistant said. A token is learned if
it covers any learned character.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.corpus import BadRowError, refuse
from ...data.errors import ColdstillError
from ...data.packing import TokenizedDocument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ...data.corpus import Document
    from ..config import CorpusConfig

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A document as it is written."""

    document: Document
    text: str
    learned: Spans | None
    """None for all of it."""
    closed: bool
    """Whether a chat's template has put all special tokens; other text gets the tokenizer's."""


class DocumentTokenizer:
    """Tokenises batches of documents with all processors (the tokenizer's own threads)."""

    separator: tuple[int, ...] = ()
    """What is put after each document that is no chat."""

    def __init__(self, tokenizer: Any, config: CorpusConfig) -> None:
        """Find out what stands after a document.

        Raises
            ColdstillError: a separator that the tokenizer cannot write
        """
        self._tokenizer = tokenizer
        self._length = config.sequence_length
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._choose_separator(config.separator)

    def __call__(
        self,
        documents: Sequence[Document],
        first_index: int,
        skip: Callable[[BadRowError], None] = refuse,
    ) -> list[tuple[Document, TokenizedDocument]]:
        """Tokenise documents; those that are not skipped are numbered from `first_index`.

        skip  told of each bad row: a chat that the tokenizer's template cannot render, a prompt
              that leaves no room for its answer

        Raises
            ColdstillError: a text after which nothing can be put, a chat without any template
        """
        texts: list[Rendered] = []
        for document in documents:
            try:
                texts.append(self._render(document))
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
        """The ids of a document with its end, and [T] which of them are learned."""
        ids = encoding.ids
        learned = np.ones(len(ids), np.bool_)
        if text.learned is not None:
            learned = _covers(encoding.offsets, text.learned)
        ends = len(self.separator)
        if not text.closed and ends and tuple(ids[-ends:]) == self.separator:
            learned[-ends:] = True  # the tokenizer's own, which covers no characters
        if not text.closed and ends and tuple(ids[-ends:]) != self.separator:
            ids = [*ids, *self.separator]
            learned = np.concatenate([learned, np.ones(ends, np.bool_)])
        before = int(learned.argmax()) if learned.any() else 0
        if before >= self._length:  # its answer would stand in a later piece, without it
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
        if document.messages:
            with self._templating(document):
                return self._render_chat(document)
        if not self._has_end:
            raise ColdstillError(
                "corpus.separator: the tokenizer has no end-of-text token to put after a text "
                f'({document.where}); set a text to put there, or "" for nothing'
            )
        if not document.prompt:
            return Rendered(document, document.text, None, closed=False)
        whole = document.prompt + document.text
        return Rendered(document, whole, [(len(document.prompt), len(whole))], closed=False)

    def _render_chat(self, document: Document) -> Rendered:
        """A chat as text, and where in it the assistant speaks."""
        messages = list(document.messages)
        whole = self._apply(messages)
        spans = [
            self._span(messages, i, whole, document.where)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return Rendered(document, whole, spans, closed=True)

    def _span(self, messages: list[Any], i: int, whole: str, where: str) -> tuple[int, int]:
        """Where message `i` is written: after the prompt to answer, up to its own end."""
        before = self._apply(messages[:i], add_generation_prompt=True) if i else ""
        if not whole.startswith(before):
            before = self._apply(messages[:i])
        after = self._apply(messages[: i + 1])
        if whole.startswith(before) and whole.startswith(after):
            return len(before), len(after)
        # a template that writes earlier turns differently (without their thoughts, say): what the
        # assistant said still stands there, followed by the same end of turn
        content = str(messages[i]["content"])
        begin = whole.find(content, len(before)) if whole.startswith(before) else -1
        if not content or begin < 0:
            raise BadRowError(
                "unrenderable_chats",
                where,
                f"the chat template writes message {i + 1} differently once more follow, so what "
                "the assistant said cannot be located; split the chat there",
            )
        closing = after[after.rfind(content) + len(content) :]
        end = begin + len(content)
        return begin, end + len(closing) if whole.startswith(closing, end) else end

    @contextmanager
    def _templating(self, document: Document) -> Iterator[None]:
        """Say of which chat, if its template fails."""
        if not self._tokenizer.chat_template:  # that is no fault of the row
            raise ColdstillError(
                f"{document.where}: a chat, but the tokenizer has no chat template; use a chat "
                "model's tokenizer or map the columns to prompt and completion"
            )
        try:
            yield
        except ColdstillError:
            raise
        except Exception as error:  # templates are programs and raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadRowError(
                "unrenderable_chats",
                document.where,
                f"the chat template cannot render this chat: {reason}; repair it",
            ) from error

    def _apply(self, messages: list[Any], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _covers(offsets: list[tuple[int, int]], spans: Spans) -> NDArray[np.bool_]:
    """[T] whether each token covers a character of any span."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    covered = np.zeros(len(begin), np.bool_)
    for first, last in spans:
        covered |= (begin < last) & (end > first)
    return covered
