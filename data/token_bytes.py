"""Which bytes of text each token stands for, by a `tokenizers.Tokenizer`.

One token at a time: a tokenizer's own `decode` strips a leading space from the first token of a
sentence, and gives the same question mark for every byte of an unfinished character.
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
"""What decoders are made of whose bytes are known here."""


class TokenBytes:
    """The bytes of every token of one tokenizer, as it stands in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        """Read from a `tokenizers.Tokenizer` (`backend_tokenizer` of a fast one)."""
        self._tokenizer = tokenizer
        self._steps = _steps(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {int(index): str(token.content) for index, token in added.items()}
        self._special = {int(index) for index, token in added.items() if token.special}

    @property
    def known(self) -> bool:
        """Whether it is known how this tokenizer makes text of its tokens. Without a decoder nobody
        says what stands between two of them."""
        return bool(self._steps) and all(_is_known(step) for step in self._steps)

    def of(self, index: int) -> bytes | None:
        """What a token puts into the text, a special one its own name; None for an id without a
        token."""
        token = self._tokenizer.id_to_token(index)
        if token is None:
            return None
        added = self._added.get(index)
        return self._content(token) if added is None else added.encode()

    def is_special(self, index: int) -> bool:
        """Whether the token stands for no text, such as the end of a document."""
        return index in self._special

    def counts(self, size: int) -> ByteCounts | None:
        """How many bytes of text each of `size` ids stands for: none for special tokens, which are
        no text, and for ids without a token. None if that is not known."""
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
                case "Strip" if not fused:  # afterwards it is the whole text that is stripped
                    token = _stripped(token, step)
        return token.encode(errors="surrogatepass")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByteCounts:
    """How many bytes the ids of a vocabulary add to a text."""

    lengths_V: NDArray[np.int64]
    """[V] in the middle of it."""
    special_V: NDArray[np.bool_]
    """[V] whether it is no text."""
    spaced_before_V: NDArray[np.bool_]
    """[V] whether the first of these bytes is a space that a text does not begin with;"""
    spaced_after_V: NDArray[np.bool_]
    """[V] whether the last one is a space that it does not end with."""

    def of_labels(self, sequences: Sequences) -> int:
        """How many bytes of text the labels of these sequences are.

        The first and the last token of a document are those that have nothing but special tokens
        before or behind them. Where a document is cut in two the end of a piece is taken for an
        end, which is a byte too little if its tokens end with their spaces.
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


def _steps(tokenizer: Any) -> list[dict[str, Any]]:
    """All steps by which a tokenizer makes text of tokens, in order."""
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
    """A WordPiece behind another one: what begins a word has a space before it, unless it is one of
    the marks that are put next to the word before."""
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
    """The letters by which byte-level tokenizers write the 256 bytes: printable ones as they are,
    the others, in order, as the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    named = {chr(byte): byte for byte in printable}
    return named | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
