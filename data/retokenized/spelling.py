"""The tokens of a tokenizer for any bytes, and the bytes of each of its tokens.

A tokenizer takes text, not bytes, and some put a space in front of a text. Here a text in the
middle of another one is tokenised without that space, bytes that are no whole character get the
tokens of single bytes, and every spelling is compared with the bytes that it spells.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..files import tokens_sha256
from ..token_bytes import TokenBytes, byte_letters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""What a special token is for, by the keys of `tokenizer_config.json`."""
_STRAY = re.compile("[\udc80-\udcff]+")
"""Bytes that are not a whole character, as Python decodes them with `surrogateescape`."""


@dataclass(frozen=True, slots=True, eq=False)
class Spelling:
    """The tokens of one stretch of text and the bytes that each of them stands for."""

    ids: NDArray[np.int32]
    """[T] the tokens."""
    starts: NDArray[np.int64]
    """[T] the first byte of each token. A space that the tokenizer adds has no byte."""
    ends: NDArray[np.int64]
    """[T] the byte after its last one. Bytes between two tokens have no token."""
    misfit: int | None = None
    """The first byte that the tokens do not reproduce; None if they reproduce the text."""
    added: bool = False
    """Whether the first token has a space that the text does not have."""


class Speller:
    """One tokenizer, read from its folder."""

    def __init__(self, folder: Path, where: str) -> None:
        """Read `tokenizer.json` and the roles in `tokenizer_config.json`. Raises ColdstillError if
        the tokenizer is missing or damaged, or the bytes of its tokens cannot be known.

        where  name of the tokenizer in messages
        """
        from tokenizers import Tokenizer

        self.where = where
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self._whole = Tokenizer.from_str(text)
            self._middle = Tokenizer.from_str(json.dumps(_without_prefix(json.loads(text))))
        except Exception as error:  # tokenizers raises nothing more precise
            raise ColdstillError(
                f"{where}: no tokenizer.json that can be read: "
                f"{' '.join(str(error).split()):.100}; the bytes of its tokens cannot be known"
            ) from error
        for tokenizer in (self._whole, self._middle):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # the name of a special token is text, too
        table = TokenBytes(self._whole)
        if not table.known:
            raise ColdstillError(
                f"{where}: the bytes of its tokens cannot be known: its decoder is missing, or is "
                "not one of ByteLevel, ByteFallback, Metaspace, WordPiece, BPEDecoder, Replace and "
                "Strip; use a tokenizer with such a decoder"
            )
        self.vocabulary: dict[str, int] = self._whole.get_vocab(with_added_tokens=True)
        self.fingerprint = tokens_sha256(self.vocabulary)
        self.size = max(self.vocabulary.values()) + 1
        """V, one more than the largest id."""
        counts = table.counts(self.size)
        assert counts is not None  # the decoder is known
        self.special_V, self._spaced_V = counts.special_V, counts.spaced_before_V
        self._spaced_after_V = counts.spaced_after_V
        found = [None if self.special_V[i] else table.of(i) for i in range(self.size)]
        self.bytes_V: list[bytes | None] = found
        """[V] the bytes of each token in the middle of a text; None for special tokens and unused
        ids."""
        self._lengths_V = np.array([len(content or b"") for content in found], np.int64)
        self.roles = _roles(folder)
        self.spaced_after_special = self._is_spaced_after_special()
        """Whether a text behind a special token begins as a whole text does, with a space that is
        not text."""
        self._letters = byte_letters() if self._is_byte_level() else None

    def id_of(self, token: str | None) -> int | None:
        """The id of a token by its name."""
        return None if token is None else self.vocabulary.get(token)

    def name_of(self, index: int) -> str:
        """The name of a token."""
        return str(self._whole.id_to_token(index))

    def shape(self) -> Any:
        """Everything that decides the tokens of a text, without the ids: two tokenizers of equal
        shapes give every text the same tokens under other ids."""
        value = json.loads(self._whole.to_str())
        for key in ("truncation", "padding", "post_processor"):
            value.pop(key, None)
        model = value["model"]
        pieces = model.get("vocab")
        if isinstance(pieces, dict):
            model["vocab"] = sorted(pieces)
        elif pieces is not None:
            if model.get("unk_id") is not None:
                model["unk_id"] = pieces[model["unk_id"]][0]
            model["vocab"] = sorted(map(list, pieces))
        added = [{k: v for k, v in each.items() if k != "id"} for each in value["added_tokens"]]
        value["added_tokens"] = sorted(added, key=lambda each: str(each["content"]))
        return value

    def prefix(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts in front of every text."""
        plain = self._whole.encode("a", add_special_tokens=False).ids
        full = self._whole.encode("a", add_special_tokens=True).ids
        places = range(len(full) - len(plain) + 1)
        start = next((at for at in places if full[at : at + len(plain)] == plain), 0)
        return tuple(full[:start])

    def written(self, text: str) -> tuple[int, ...]:
        """The tokens of a text in which names of special tokens mean these tokens."""
        self._middle.encode_special_tokens = False
        ids = self._middle.encode(text, add_special_tokens=False).ids
        self._middle.encode_special_tokens = True
        return tuple(ids)

    def _is_spaced_after_special(self) -> bool:
        whole = tuple(self._whole.encode("a", add_special_tokens=False).ids)
        special = np.flatnonzero(self.special_V)
        if not len(special) or not whole or not self.adds_space(whole[0]):
            return False
        self._whole.encode_special_tokens = False
        behind = self._whole.encode(self.name_of(int(special[0])) + "a", add_special_tokens=False)
        self._whole.encode_special_tokens = True
        return tuple(behind.ids[1:]) == whole

    def text_of(self, tokens_T: NDArray[np.int32], *, first: bool, last: bool) -> list[bytes]:
        """[T] the bytes of consecutive text tokens of a document.

        first, last  whether they begin or end as a whole text does, so that a space that the
                     tokenizer has added there is not text

        Raises
            KeyError: an id without a token (which)
        """
        found = []
        for index in tokens_T.tolist():
            content = self.bytes_V[index] if 0 <= index < self.size else None
            if content is None:
                raise KeyError(index)
            found.append(content)
        if first and found and self._spaced_V[tokens_T[0]]:
            found[0] = found[0][1:]
        if last and found and self._spaced_after_V[tokens_T[-1]]:
            found[-1] = found[-1][:-1]
        return found

    def adds_space(self, index: int) -> bool:
        """Whether the first byte of a token is a space that is not text where a text begins."""
        return bool(self._spaced_V[index])

    def spell(self, texts: Sequence[tuple[bytes, bool]]) -> list[Spelling]:
        """The tokens of each text. Each comes with whether it begins as a whole text does."""
        parts: list[list[tuple[str, bytes]]] = []
        batches: dict[bool, list[str]] = {True: [], False: []}
        for content, begins in texts:
            decoded = content.decode("utf-8", errors="surrogateescape")
            own, at = [], 0
            for stray in _STRAY.finditer(decoded):
                own += [("text", decoded[at : stray.start()].encode())]
                own += [("bytes", stray[0].encode("utf-8", errors="surrogateescape"))]
                at = stray.end()
            own += [("text", decoded[at:].encode())]
            own = [part for part in own if part[1]]
            parts.append(own)
            for place, (kind, piece) in enumerate(own):
                if kind == "text":
                    batches[begins and place == 0].append(piece.decode())
        encoded = {
            begins: iter(
                (self._whole if begins else self._middle).encode_batch(
                    batch, add_special_tokens=False
                )
            )
            for begins, batch in batches.items()
        }
        spellings = []
        for own, (_, begins) in zip(parts, texts, strict=True):
            joined = Joined()
            for place, (kind, piece) in enumerate(own):
                if kind == "bytes":
                    joined.add_stray(piece, self.stray(piece), self._lengths_V)
                else:
                    first = begins and place == 0
                    joined.add(piece, next(encoded[first]).ids, self, alone=first)
            spellings.append(joined.spelling())
        return spellings

    def first_token(self, content: bytes) -> int:
        """The first token of some bytes in the middle of a text; -1 if no token begins them."""
        return next(iter(self.pieces(content)), -1)

    def pieces(self, content: bytes) -> list[int]:
        """The tokens of some bytes in the middle of a text, up to bytes that have none."""
        if self._letters is not None and _is_broken(content):
            found = self._whole.model.tokenize("".join(self._letters[byte] for byte in content))
            return [int(token.id) for token in found]
        spelling = self.spell([(content, False)])[0]
        if spelling.misfit is not None:
            return []
        joined = np.cumprod(spelling.starts == np.append(0, spelling.ends[:-1]))
        ids: list[int] = spelling.ids[: int(joined.sum())].tolist()
        return ids

    def stray(self, content: bytes) -> list[int]:
        """The tokens of bytes that are not a whole character; empty if some of them have none."""
        if self._letters is not None:
            found = self._whole.model.tokenize("".join(self._letters[byte] for byte in content))
            ids = [int(token.id) for token in found]
            return ids if sum(self._lengths_V[ids]) == len(content) else []
        named = [self.vocabulary.get(f"<0x{byte:02X}>") for byte in content]
        known = [index for index in named if index is not None]
        return known if len(known) == len(named) else []

    def joined_bytes(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of tokens; None if one of them is not text."""
        found = [self.bytes_V[index] for index in ids]
        return None if None in found else b"".join(content or b"" for content in found)

    def lengths(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """[T] the number of bytes of each token."""
        return self._lengths_V[np.array(ids, np.int64)]

    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in self._whole.decoder.__getstate__().decode()


class Joined:
    """Spellings one after the other."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._starts: list[NDArray[np.int64]] = []
        self._ends: list[NDArray[np.int64]] = []
        self._at = 0
        self._misfit: int | None = None
        self._added = False

    def add(self, content: bytes, ids: Sequence[int], speller: Speller, *, alone: bool) -> None:
        """Add the tokens of a text.  alone  whether no text is before it"""
        found = speller.joined_bytes(ids)
        lengths = speller.lengths(ids)
        if found != content and alone and found is not None and len(ids):
            if found == b" " + content:
                lengths[0] -= 1
                self._added, found = True, content
            elif found == content + b" ":
                lengths[-1] -= 1
                found = content
        if found != content and self._misfit is None:
            self._misfit = self._at + _first_difference(found or b"", content)
        ends = self._at + np.cumsum(lengths, dtype=np.int64)
        self._put(ids, ends - lengths, ends)
        self._at += len(content)

    def add_stray(self, content: bytes, ids: Sequence[int], lengths_V: NDArray[np.int64]) -> None:
        """Add bytes that are not a whole character, without tokens if there are none."""
        lengths = lengths_V[np.array(ids, np.int64)]
        ends = self._at + np.cumsum(lengths, dtype=np.int64)
        self._put(ids, ends - lengths, ends)
        self._at += len(content)

    def _put(self, ids: Sequence[int], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._ids += ids
        self._starts.append(starts)
        self._ends.append(ends)

    def spelling(self) -> Spelling:
        none = np.zeros(0, np.int64)
        return Spelling(
            np.array(self._ids, np.int32),
            np.concatenate([none, *self._starts]),
            np.concatenate([none, *self._ends]),
            self._misfit,
            self._added,
        )


def _first_difference(found: bytes, wanted: bytes) -> int:
    same = 0
    for one, other in zip(found, wanted, strict=False):
        if one != other:
            break
        same += 1
    return same


def _is_broken(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return False


def _without_prefix(value: Any) -> Any:
    """The JSON of a tokenizer without the steps that put a space in front of a text."""
    if isinstance(value, list):
        kept = [_without_prefix(each) for each in value]
        return [each for each in kept if each != _NOTHING]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Prepend":
        return _NOTHING
    made = {key: _without_prefix(each) for key, each in value.items() if key != "vocab"}
    if "vocab" in value:
        made["vocab"] = value["vocab"]
    if value.get("type") == "Metaspace":
        made["prepend_scheme"] = "never"
        made.pop("add_prefix_space", None)
    if value.get("type") == "ByteLevel":
        made["add_prefix_space"] = False
    if made.get("normalizer") == _NOTHING:
        made["normalizer"] = None
    return made


_NOTHING = {"type": "Nothing"}


def _roles(folder: Path) -> dict[str, str]:
    """The special tokens of a tokenizer by role, as far as its files name them."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for role in ROLES:
            token = named.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                roles[role] = content
    return roles
