"""The bytes of text of each token of a `tokenizers.Tokenizer`.

A tokenizer's own `decode` cannot decode single tokens: it strips a leading space from the first
token of a text, and replaces each byte of an incomplete character by the same question mark.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .alignment import label_places
from .errors import ColdstillError
from .store.layout import TOKENIZER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .schema import Sequences
    from .store.reader import StoreReader

_FILE = "tokenizer.json"

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_STEPS = {
    "ByteFallback", "ByteLevel", "BPEDecoder", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece",
}  # fmt: skip
"""The steps of decoders that are supported here."""


class TokenBytes:
    """The bytes of every token of one tokenizer, in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        """Use a `tokenizers.Tokenizer` (the `backend_tokenizer` of a fast tokenizer)."""
        self._tokenizer = tokenizer
        self._steps = _steps(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {int(index): str(token.content) for index, token in added.items()}
        self._special = {int(index) for index, token in added.items() if token.special}

    @property
    def known(self) -> bool:
        """Whether all steps of the tokenizer's decoder are supported. Without a decoder the text
        between two tokens is unknown."""
        return bool(self._steps) and all(_is_known(step) for step in self._steps)

    def of(self, index: int) -> bytes | None:
        """The bytes of a token; for a special token those of its name, None for an unused id."""
        token = self._tokenizer.id_to_token(index)
        if token is None:
            return None
        added = self._added.get(index)
        return self._content(token) if added is None else added.encode()

    def is_special(self, index: int) -> bool:
        """Whether the token is not text, such as the end of a document."""
        return index in self._special

    def counts(self, size: int) -> ByteCounts | None:
        """The number of bytes of each of `size` ids, 0 for special tokens and unused ids; None if
        the tokenizer's decoder is not supported."""
        if not self.known:
            return None
        every = [b"" if index in self._special else self.of(index) or b"" for index in range(size)]
        starts = any(
            step["type"] == "WordPiece"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            or (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
            for step in self._steps
        )
        ends = any(step["type"] == "BPEDecoder" for step in self._steps)
        special_V = np.zeros(size, np.bool_)
        special_V[[index for index in self._special if index < size]] = True
        return ByteCounts(
            lengths_V=np.array([len(content) for content in every], np.int64),
            special_V=special_V,
            spaced_before_V=np.array([starts and c.startswith(b" ") for c in every], np.bool_),
            spaced_after_V=np.array([ends and c.endswith(b" ") for c in every], np.bool_),
        )

    def _content(self, token: str) -> bytes:
        fused = False
        for step in self._steps:
            match step["type"]:
                case "ByteLevel" if all(letter in _ALPHABET for letter in token):
                    return bytes(_ALPHABET[letter] for letter in token)
                case "ByteFallback" if (byte := _BYTE.fullmatch(token)) is not None:
                    return bytes([int(byte[1], 16)])
                case "Metaspace":
                    token = token.replace(step["replacement"], " ")
                case "Replace" if "String" in step["pattern"]:
                    token = token.replace(step["pattern"]["String"], step["content"])
                case "BPEDecoder":
                    token = token.replace(step["suffix"], " ")
                case "WordPiece":
                    token = _in_a_sentence(token, step)
                case "Fuse":
                    fused = True
                case "Strip" if not fused:  # after `Fuse` the whole text is stripped
                    token = _stripped(token, step)
        return token.encode(errors="surrogatepass")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByteCounts:
    """The number of bytes that each id of a vocabulary adds to a text."""

    lengths_V: NDArray[np.int64]
    """[V] bytes in the middle of a text."""
    special_V: NDArray[np.bool_]
    """[V] whether the token is special, so not text."""
    spaced_before_V: NDArray[np.bool_]
    """[V] whether the first byte is a space that is dropped at the beginning of a text."""
    spaced_after_V: NDArray[np.bool_]
    """[V] whether the last byte is a space that is dropped at the end of a text."""

    def of_labels(self, sequences: Sequences) -> int:
        """The number of bytes of text of all labels of these sequences.

        The first token of a document has only special tokens before it, and the last one only
        special tokens after it. The end of a piece of a document counts as an end of text, which is
        one byte too little if the tokens end with their spaces.
        """
        tokens_N = sequences.tokens.values
        offsets = sequences.tokens.offsets[:-1]
        places_M = np.repeat(offsets, sequences.positions.lengths) + label_places(sequences)
        firsts_D = sequences.document_starts.values + np.repeat(
            offsets, sequences.document_starts.lengths
        )
        ends_D = np.append(firsts_D[1:], len(tokens_N))
        inside_M = np.searchsorted(firsts_D, places_M, side="right") - 1
        texts_before = np.append(0, np.cumsum(~self.special_V[tokens_N]))
        before_M = texts_before[places_M] - texts_before[firsts_D[inside_M]]
        behind_M = texts_before[ends_D[inside_M]] - texts_before[places_M + 1]
        labels_M = tokens_N[places_M]
        spaces = np.count_nonzero(self.spaced_before_V[labels_M] & (before_M == 0))
        spaces += np.count_nonzero(self.spaced_after_V[labels_M] & (behind_M == 0))
        return int(self.lengths_V[labels_M].sum()) - int(spaces)


def token_bytes_of(store: StoreReader) -> TokenBytes | None:
    """The bytes of the tokens of a store's tokenizer; None if it has no `tokenizer.json`. Raises
    ColdstillError if the tokenizer cannot be read."""
    if not store.place.exists(f"{TOKENIZER}/{_FILE}"):
        return None
    path = store.tokenizer_folder() / _FILE
    from tokenizers import Tokenizer

    try:
        return TokenBytes(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ColdstillError(f"{path}: {' '.join(str(error).split()):.100}") from error


def _steps(tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a tokenizer's decoder, in order."""
    if tokenizer.decoder is None:
        return []

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step.get("type") != "Sequence":
            return [step]
        return [inner for each in step["decoders"] for inner in flat(each)]

    return flat(json.loads(tokenizer.decoder.__getstate__()))


def _is_known(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] in _STEPS


def _in_a_sentence(token: str, step: dict[str, Any]) -> str:
    """The text of a WordPiece token after another token: a space precedes each token that begins a
    word, except punctuation marks that follow the word directly."""
    from tokenizers import decoders

    decoder = decoders.WordPiece(prefix=step["prefix"], cleanup=step["cleanup"])
    return str(decoder.decode(["x", token]))[1:]


def _stripped(token: str, step: dict[str, Any]) -> str:
    mark, start, stop = step["content"], step["start"], step["stop"]
    for _ in range(start):
        token = token.removeprefix(mark)
    for _ in range(stop):
        token = token.removesuffix(mark)
    return token


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers use for the 256 bytes: printable bytes stand for
    themselves, the others, in order, for the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    named = {chr(byte): byte for byte in printable}
    return named | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def byte_letters() -> list[str]:
    """The character of each of the 256 bytes in byte-level tokenizers."""
    letters = {byte: letter for letter, byte in _ALPHABET.items()}
    return [letters[byte] for byte in range(256)]
