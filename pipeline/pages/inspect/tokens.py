"""Token ids as text, by the tokenizer that a store carries; without torch or transformers."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from ....data.errors import ColdstillError
from ....data.token_bytes import TokenBytes, token_bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ....data.store.reader import StoreReader


class TokenTexts:
    """What the ids of a store stand for."""

    def __init__(self, table: TokenBytes | None, lack: str = "") -> None:
        """Use `token_texts`; without a tokenizer `lack` says why there is none."""
        self.lack = lack
        """Why ids are shown instead of text, or nothing."""
        self._bytes = table
        self._known: dict[int, str] = {}

    def of(self, index: int) -> str:
        """The token as text: blanks and line ends as they are, other invisible characters and the
        bytes of unfinished ones as escapes; `#7` for an id without text."""
        if index not in self._known:
            self._known[index] = self._read(index)
        return self._known[index]

    def text(self, indices: Iterable[int]) -> str:
        """Tokens in a row as text: as `of`, but a character whose bytes lie in several tokens is
        whole."""
        return legible(b"".join(self._content(index) or f"#{index}".encode() for index in indices))

    def prose(self, indices: Sequence[int], *, ended: bool = False) -> str:
        """The same for reading: without special tokens, and with an ellipsis where it was cut.

        ended  whether it ends here though its last token does not say so
        """
        words = [index for index in indices if not self._is_special(index)]
        whole = ended or (len(indices) > 0 and self._is_special(indices[-1]))
        return self.text(words) + ("" if whole else "\u2026")

    def _is_special(self, index: int) -> bool:
        return self._bytes is not None and self._bytes.is_special(index)

    def _read(self, index: int) -> str:
        content = self._content(index)
        return f"#{index}" if content is None else legible(content) or '""'

    def _content(self, index: int) -> bytes | None:
        return None if self._bytes is None else self._bytes.of(index)


def token_texts(store: StoreReader) -> TokenTexts:
    """The texts of a store's tokens; ids where its tokenizer is missing or cannot be read."""
    try:
        table = token_bytes_of(store)
    except ColdstillError as error:
        return TokenTexts(None, f"{error}: ids are shown instead of text")
    lack = "no tokenizer.json in the store: ids are shown instead of text"
    return TokenTexts(table, lack if table is None else "")


def legible(content: bytes) -> str:
    """Text that moves no cursor and turns no line round: what is no letter is an escape."""
    text = content.decode(errors="backslashreplace")
    return "".join(letter if _is_shown(letter) else _escape(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    # controls, marks of direction, unassigned, private: a terminal must not obey a corpus, and an
    # inspector must not hide what is in it
    return letter in " \n\t" or unicodedata.category(letter)[0] not in "CZ"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
