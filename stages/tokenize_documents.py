"""Documents to token ids, and which of those ids are to be learned.

Everything becomes one text with spans of characters: a plain document is learned whole, of a prompt
with completion only the completion, of a chat only what the assistant said. A token is learned if
it covers any learned character.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.errors import ColdstillError
from ..data.packing import TokenizedDocument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..data.corpus import Document

Spans = list[tuple[int, int]]


class DocumentTokenizer:
    """Tokenises batches of documents with all processors (the tokenizer's own threads)."""

    def __init__(self, tokenizer: Any, separator: str | None, where: str) -> None:
        """Find out what stands after a document.

        separator  None for the tokenizer's own end of text, "" for nothing

        Raises
            ColdstillError: a separator that the tokenizer cannot write
        """
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if separator is None:
            end = tokenizer.eos_token_id
            self.separator = () if end is None else (int(end),)
        else:
            ids = self._backend.encode(separator, add_special_tokens=False).ids
            self.separator = tuple(ids)
            if separator and not ids:
                raise ColdstillError(f"{where}: the tokenizer has no tokens for {separator!r}")

    def __call__(self, documents: Sequence[Document], first_index: int) -> list[TokenizedDocument]:
        """Tokenise documents numbered from `first_index`.

        Raises
            ColdstillError: a chat that the tokenizer's template cannot render (which, and why)
        """
        texts: list[str] = []
        spans: list[Spans | None] = []
        for document in documents:
            text, learned = self._render(document) if document.messages else _plain(document)
            texts.append(text)
            spans.append(learned)
        chats = [bool(document.messages) for document in documents]
        encodings: list[Any] = [None] * len(documents)
        for is_chat in (False, True):
            # a chat's template writes its own special tokens; other text gets the tokenizer's
            rows = [i for i, chat in enumerate(chats) if chat is is_chat]
            batch = [texts[i] for i in rows]
            found = self._backend.encode_batch(batch, add_special_tokens=not is_chat)
            for row, encoding in zip(rows, found, strict=True):
                encodings[row] = encoding
        return [
            self._finish(first_index + i, encodings[i], spans[i], closed=chats[i])
            for i in range(len(documents))
        ]

    def _finish(
        self, index: int, encoding: Any, spans: Spans | None, *, closed: bool
    ) -> TokenizedDocument:
        ids = encoding.ids
        learned = np.ones(len(ids), np.bool_) if spans is None else _covers(encoding.offsets, spans)
        ends = len(self.separator)
        if not closed and ends and tuple(ids[-ends:]) == self.separator:
            learned[-ends:] = True  # the tokenizer's own, which covers no characters
        if not closed and ends and tuple(ids[-ends:]) != self.separator:
            ids = [*ids, *self.separator]
            learned = np.concatenate([learned, np.ones(ends, np.bool_)])
        return TokenizedDocument(index, np.array(ids, dtype=np.int32), learned)

    def _render(self, document: Document) -> tuple[str, Spans]:
        """A chat as text, and where in it the assistant speaks."""
        messages = list(document.messages)
        if not self._tokenizer.chat_template:
            raise ColdstillError(
                f"{document.where}: a chat, but the tokenizer has no chat template; use a chat "
                "model's tokenizer or map the columns to prompt and completion"
            )
        try:
            whole = self._apply(messages)
            spans = [
                self._span(messages, i, whole, document.where)
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except ColdstillError:
            raise
        except Exception as error:  # templates are programs and raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ColdstillError(
                f"{document.where}: the chat template cannot render this chat: {reason}"
            ) from error
        return whole, spans

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
            raise ColdstillError(
                f"{where}: the chat template writes message {i + 1} differently once more follow, "
                "so what the assistant said cannot be located; split the chat there"
            )
        closing = after[after.rfind(content) + len(content) :]
        end = begin + len(content)
        return begin, end + len(closing) if whole.startswith(closing, end) else end

    def _apply(self, messages: list[Any], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _plain(document: Document) -> tuple[str, Spans | None]:
    if not document.prompt:
        return document.text, None
    whole = document.prompt + document.text
    return whole, [(len(document.prompt), len(whole))]


def _covers(offsets: list[tuple[int, int]], spans: Spans) -> NDArray[np.bool_]:
    """[T] whether each token covers a character of any span."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    covered = np.zeros(len(begin), np.bool_)
    for first, last in spans:
        covered |= (begin < last) & (end > first)
    return covered
