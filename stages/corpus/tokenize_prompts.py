"""Prompts to token ids, for a teacher that answers them itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.corpus import BadRowError
from ...data.errors import ColdstillError
from .tokenize_documents import DocumentTokenizer, Rendered

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.corpus import Document


class PromptTokenizer(DocumentTokenizer):
    """Of each document only what the teacher is to answer, with nothing to learn in it.

    Of a prompt with completion the prompt, of a chat everything up to the last turn that is not
    the assistant's. A plain text is refused: it asks nothing.
    """

    def _choose_separator(self, separator: str | None) -> None:
        self._has_end = True  # nothing is put after a prompt: the answer follows

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
        # an end that the tokenizer puts after every text would end the answer before it begins
        if ids and added[-1] and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()
        where = text.document.where
        if not ids:
            raise BadRowError("empty_prompts", where, "its prompt has no tokens; give it some text")
        if len(ids) >= self._length:
            raise self._too_long(where, len(ids))
        return ids, np.zeros(len(ids), np.bool_)
