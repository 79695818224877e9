"""Which bytes of text each token stands for, by a `tokenizers.Tokenizer`.

One token at a time: a tokenizer's own `decode` strips a leading space from the first token of a
sentence, and gives the same question mark for every byte of an unfinished character.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ColdstillError
from .layout import TOKENIZER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .reader import StoreReader

_FILE = "tokenizer.json"

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""


class TokenBytes:
    """The bytes of every token of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Read from a `tokenizers.Tokenizer` (`backend_tokenizer` of a fast one)."""
        self._tokenizer = tokenizer
        self._decoders = _decoders(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {int(index): str(token.content) for index, token in added.items()}
        self._special = {int(index) for index, token in added.items() if token.special}

    def of(self, index: int) -> bytes | None:
        """What a token puts into the text, a special one its own name; None for an id without a
        token."""
        token = self._tokenizer.id_to_token(index)
        if token is None:
            return None
        added = self._added.get(index)
        return self._content(token) if added is None else added.encode()

    def lengths(self, size: int) -> NDArray[np.int64]:
        """[size] how many bytes of text each id stands for: none for special tokens, which are no
        text, and for ids without a token."""
        found = (b"" if index in self._special else self.of(index) or b"" for index in range(size))
        return np.fromiter((len(content) for content in found), np.int64, size)

    def _content(self, token: str) -> bytes:
        if "ByteLevel" in self._decoders:
            if all(letter in _ALPHABET for letter in token):
                return bytes(_ALPHABET[letter] for letter in token)
            return token.encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._decoders & {"Metaspace", "Replace"}:
            token = token.replace(_SPACE_MARK, " ")
        return token.encode(errors="surrogatepass")


def token_bytes_of(store: StoreReader) -> TokenBytes | None:
    """By the tokenizer that a store carries, without torch or transformers; None if it has none.

    Raises
        ColdstillError: it cannot be read
    """
    if not store.place.exists(f"{TOKENIZER}/{_FILE}"):
        return None
    path = store.tokenizer_folder() / _FILE
    from tokenizers import Tokenizer

    try:
        return TokenBytes(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ColdstillError(f"{path}: {' '.join(str(error).split()):.100}") from error


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
