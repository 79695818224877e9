"""Token ids as text, by the tokenizer that a store carries; loads neither torch nor transformers.

One token at a time: a tokenizer's own `decode` strips a leading space from the first token of a
sentence, and gives the same question mark for every byte of an unfinished character.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from ...data.layout import TOKENIZER

if TYPE_CHECKING:
    from ...data.reader import StoreReader

_FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""


class TokenTexts:
    """What the ids of a store stand for."""

    def __init__(self, tokenizer: Any, lack: str = "") -> None:
        """Use `token_texts`; without a tokenizer `lack` says why there is none."""
        self.lack = lack
        """Why ids are shown instead of text, or nothing."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._decoders = _decoders(tokenizer) if tokenizer else set()
        added = tokenizer.get_added_tokens_decoder() if tokenizer else {}
        self._added = {int(index): str(token.content) for index, token in added.items()}

    def of(self, index: int) -> str:
        """The token as text: blanks and line ends as they are, other invisible characters and the
        bytes of unfinished ones as escapes; `#7` for an id without text."""
        if index not in self._known:
            self._known[index] = self._read(index)
        return self._known[index]

    def _read(self, index: int) -> str:
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(index)
        if token is None:
            return f"#{index}"
        content = self._added.get(index)
        return _legible(self._content(token) if content is None else content.encode()) or '""'

    def _content(self, token: str) -> bytes:
        """The bytes that a token of the table puts into the text."""
        if "ByteLevel" in self._decoders:
            if all(letter in _ALPHABET for letter in token):
                return bytes(_ALPHABET[letter] for letter in token)
            return token.encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._decoders & {"Metaspace", "Replace"}:
            token = token.replace(_SPACE_MARK, " ")
        return token.encode(errors="surrogatepass")


def token_texts(store: StoreReader) -> TokenTexts:
    """The texts of a store's tokens; ids where its tokenizer is missing or cannot be read."""
    if not store.place.exists(f"{TOKENIZER}/{_FILE}"):
        return TokenTexts(None, f"no {_FILE} in the store: ids are shown instead of text")
    path = store.tokenizer_folder() / _FILE
    from tokenizers import Tokenizer

    try:
        return TokenTexts(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing more precise
        reason = " ".join(str(error).split())
        return TokenTexts(None, f"{path}: {reason:.100}: ids are shown instead of text")


def _decoders(tokenizer: Any) -> set[str]:
    """The types of all steps by which a tokenizer makes text of tokens."""
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    return {str(step.get("type")) for step in [state, *state.get("decoders", [])]}


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers write the 256 bytes: printable ones as they are,
    the others, in order, as the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    named = {chr(byte): byte for byte in printable}
    return named | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _legible(content: bytes) -> str:
    text = content.decode(errors="backslashreplace")
    return "".join(letter if _is_shown(letter) else _escape(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    # controls, marks of direction, unassigned, private: a terminal must not obey a corpus, and an
    # inspector must not hide what is in it
    return letter in " \n\t" or unicodedata.category(letter)[0] not in "CZ"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
