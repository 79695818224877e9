"""Token ids as text, by the tokenizer in the store; needs neither torch nor transformers."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.token_bytes import TokenBytes, token_bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...data.store.reader import StoreReader


class TokenTexts:
    """The texts of a store's token ids."""

    def __init__(self, table: TokenBytes | None, lack: str = "") -> None:
        """Called by `token_texts`; `lack` is the reason if there is no table."""
        self.lack = lack
        """Why ids are shown instead of text; empty if texts are known."""
        self._bytes = table
        self._known: dict[int, str] = {}

    def of(self, index: int) -> str:
        """Return a token as text, or `#7` for an id without text.

        Blanks and line ends stay; other invisible characters and incomplete bytes are escaped.
        """
        if index not in self._known:
            self._known[index] = self._read(index)
        return self._known[index]

    def text(self, indices: Iterable[int]) -> str:
        """Return consecutive tokens as text, as `of`; a character can span several tokens."""
        return legible(b"".join(self._content(index) or f"#{index}".encode() for index in indices))

    def prose(self, indices: Sequence[int], *, ended: bool = False) -> str:
        """Return text for reading, without special tokens; an ellipsis marks cut text.

        ended  whether the text is complete although its last token is not a special one
        """
        words = [index for index in indices if not self.is_special(index)]
        whole = ended or (len(indices) > 0 and self.is_special(indices[-1]))
        return self.text(words) + ("" if whole else "\u2026")

    def is_special(self, index: int) -> bool:
        """Whether a token is a mark of the tokenizer, such as an end of text."""
        return self._bytes is not None and self._bytes.is_special(index)

    def _read(self, index: int) -> str:
        content = self._content(index)
        return f"#{index}" if content is None else legible(content) or '""'

    def _content(self, index: int) -> bytes | None:
        return None if self._bytes is None else self._bytes.of(index)


def token_texts(store: StoreReader) -> TokenTexts:
    """Return the texts of a store's tokens, or ids if its tokenizer is missing or damaged."""
    try:
        table = token_bytes_of(store)
    except ColdstillError as error:
        return TokenTexts(None, f"{error}: ids are shown instead of text")
    lack = "no tokenizer.json in the store: ids are shown instead of text"
    return TokenTexts(table, lack if table is None else "")


def legible(content: bytes) -> str:
    """Return text in which control and direction characters are escaped."""
    text = content.decode(errors="backslashreplace")
    return "".join(letter if _is_shown(letter) else _escape(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    # controls, direction marks, unassigned and private characters: they could change the terminal
    # or hide parts of the corpus
    return letter in " \n\t" or unicodedata.category(letter)[0] not in "CZ"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
