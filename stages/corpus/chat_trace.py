"""Where each character of a rendered chat comes from: from which message, or from the template.

Templates are programs: they trim, drop, reorder and repeat. Searching their output for what was
said finds the wrong place as soon as it stands there twice. So a chat is rendered a second time
with every character replaced by one of Unicode's private use areas, another one for every string
of the chat. Where both renderings agree once the characters are put back, the second one tells
the origin of each character of the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .chat_template import THOUGHTS, Chat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_FIRST, _LAST = 0xF0000, 0x10FFFD
_ROOM = _LAST - _FIRST - 1
"""Characters for private use in planes 15 and 16; two of this range are no characters."""

_TINTED = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_ESCAPED = frozenset('"\\')
"""Written differently inside JSON, so replacing them would change the text around them."""

_TAG = r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,40}\]|(?<![\w/<])/\w+"
_THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?</\1>|\[THINK\].*?\[/THINK\]"
    r"|\A(?:(?!<think>).)*?</think>",  # the generation prompt may have opened it
    re.DOTALL,
)

LEVELS = 3
"""How carefully characters are replaced. A template may look for tags such as `</think>` in what
was said, or for words: what must not change at a level is left as it is."""


class Piece(NamedTuple):
    """One string of a chat."""

    message: int
    kind: str
    """`content`, `thoughts` or `tool call`."""
    codes: NDArray[np.uint32]
    """What its characters were replaced by, in order; those that were not are missing."""
    unthought: NDArray[np.uint32]
    """The same without the thoughts inside a content."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a message stands in a rendered chat."""

    begin: int
    end: int
    before: str
    """What stands between it and the message before, all of it written by the template."""
    after: str
    """The same up to the message behind it."""


class Tinted:
    """A chat of replaced characters."""

    def __init__(self, chat: Chat, source: str, level: int) -> None:
        """Replace the characters of `chat`.

        source  of the template, in which its tags and words are looked up
        """
        self._kept = _kept(source, level)
        self._all = level == 0
        self._originals: dict[int, str] = {}
        self._owners: list[int] = []
        self.pieces: list[Piece] = []
        texts = list(_texts(chat.messages))
        self._foreign = set(map(ord, _TINTED.findall("".join(texts))))
        self._quota = _ROOM // max(1, len(texts)) - 1
        self._next = _FIRST
        self.chat = replace(
            chat, messages=tuple(self._message(i, m) for i, m in enumerate(chat.messages))
        )

    def restore(self, text: str) -> str:
        """A rendering of the replaced chat as that of the chat itself would be."""
        return text.translate(self._originals)

    def missing(self, text: str) -> tuple[list[Piece], list[Piece]]:
        """The strings that a rendering of the replaced chat does not hold, and those of which it
        leaves out thoughts only."""
        lost, thoughtless = [], []
        codes = _codes(text)
        for piece, places in zip(self.pieces, self._places(codes), strict=True):
            found = codes[places]
            if _is_repeated(found, piece.codes):
                continue
            only_thoughts = piece.kind == "thoughts" and not len(found)
            if only_thoughts or (
                len(piece.unthought) < len(piece.codes) and _is_repeated(found, piece.unthought)
            ):
                thoughtless.append(piece)
            else:
                lost.append(piece)
        return lost, thoughtless

    def stretches(self, text: str) -> dict[int, Stretch | None]:
        """Where each message stands in the restored `text`; None if another one stands inside."""
        codes = _codes(text)
        owners = np.full(len(codes), -1)
        for piece, places in zip(self.pieces, self._places(codes), strict=True):
            # a string that stands there again (a tool's name before its answer) is the template's
            owners[places[: len(piece.codes)]] = piece.message
        nothing = [code for code, original in self._originals.items() if not original]
        lengths = np.where(np.isin(codes, nothing), 0, 1)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        said = np.flatnonzero(owners >= 0)
        speakers = owners[said]
        firsts = np.flatnonzero(np.diff(speakers, prepend=-1))
        whole, found = self.restore(text), dict[int, Stretch | None]()
        for first, behind in pairwise([*firsts, len(said)]):
            message = int(speakers[first])
            begin, end = int(begins[said[first]]), int(ends[said[behind - 1]])
            left = ends[said[first - 1]] if first else 0
            right = begins[said[behind]] if behind < len(said) else len(whole)
            is_first = message not in found
            stretch = Stretch(begin, end, whole[left:begin], whole[end:right])
            found[message] = stretch if is_first else None
        return found

    def _places(self, codes: NDArray[np.uint32]) -> list[NDArray[np.int64]]:
        """Where in a rendering the characters of each string stand."""
        table = np.full(self._next - _FIRST + 1, -1)  # the last is for what is no string's
        for code, piece in zip(self._originals, self._owners, strict=True):
            table[code - _FIRST] = piece
        rows = codes.astype(np.int64) - _FIRST
        pieces = table[np.where((rows < 0) | (rows >= len(table)), -1, rows)]
        order = np.argsort(pieces, kind="stable")
        bounds = np.searchsorted(pieces[order], np.arange(len(self.pieces) + 1))
        return [order[begin:end] for begin, end in pairwise(bounds)]

    def _message(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        tinted, before = dict(message), len(self.pieces)
        for key in THOUGHTS:
            if isinstance(message.get(key), str):
                tinted[key] = self._replace(i, "thoughts", message[key])
        if message.get("tool_calls"):
            tinted["tool_calls"] = [self._call(i, call) for call in message["tool_calls"]]
        if isinstance(message.get("content"), list):
            tinted["content"] = [
                part | {"text": self._replace(i, "content", part["text"])}
                for part in message["content"]
            ]
        if isinstance(message.get("content"), str):
            tinted["content"] = self._replace(i, "content", message["content"])
            silent = not any(len(piece.codes) for piece in self.pieces[before:])
            if silent and message["role"] != "system":  # a character that stands for none
                code = self._new("", i, "content")
                tinted["content"] += chr(code)
        return tinted

    def _call(self, i: int, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(i, call["function"])}
        tinted = dict(call)
        if isinstance(call.get("name"), str):
            tinted["name"] = self._replace(i, "tool call", call["name"])
        if "arguments" in call:
            tinted["arguments"] = self._argument(i, call["arguments"])
        return tinted

    def _argument(self, i: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._replace(i, "tool call", value)
        if isinstance(value, dict):
            return {
                self._replace(i, "tool call", key) if self._all else key: self._argument(i, part)
                for key, part in value.items()
            }
        return [self._argument(i, part) for part in value] if isinstance(value, list) else value

    def _replace(self, i: int, kind: str, text: str) -> str:
        """A string with its characters replaced."""
        table: dict[int, int] = {}
        owner = len(self.pieces)
        # both ends first: they say where the string begins and ends if there is no room for more
        ends = text.strip()
        for character in dict.fromkeys(ends[:1] + ends[-1:] + text):
            if len(table) < self._quota and self._is_replaced(character):
                table[ord(character)] = self._code(character, owner)
        parts, position = [], 0
        for kept in self._kept.finditer(text) if self._kept else ():
            parts += [text[position : kept.start()].translate(table), kept.group()]
            position = kept.end()
        tinted = "".join([*parts, text[position:].translate(table)])
        codes = _codes(tinted)
        mine = codes >= _FIRST
        said = np.ones(len(codes), np.bool_)
        for thought in _THOUGHT.finditer(text):
            said[thought.start() : thought.end()] = False
        self.pieces.append(Piece(i, kind, codes[mine], codes[mine & said]))
        return tinted

    def _is_replaced(self, character: str) -> bool:
        if character.isspace() or character in _ESCAPED or ord(character) < 32:
            return False
        return self._all or character.isalnum() or ord(character) >= _FIRST

    def _new(self, original: str, i: int, kind: str) -> int:
        code = self._code(original, len(self.pieces))
        codes = np.array([code], np.uint32)
        self.pieces.append(Piece(i, kind, codes, codes))
        return code

    def _code(self, original: str, owner: int) -> int:
        while self._next in self._foreign or self._next & 0xFFFE == 0xFFFE:
            self._next += 1
        code = self._next
        self._next += 1
        self._originals[code] = original
        self._owners.append(owner)
        return code


def behind_last(text: str) -> str:
    """What a template writes behind the last replaced character of a rendering."""
    found = _TINTED.search(text[::-1])
    return text[len(text) - found.start() :] if found else text


def before_first(text: str) -> str:
    """What a template writes before the first replaced character of a rendering."""
    found = _TINTED.search(text)
    return text[: found.start()] if found else text


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _is_repeated(found: NDArray[np.uint32], wanted: NDArray[np.uint32]) -> bool:
    """Whether `found` is `wanted`, once or several times."""
    if not len(wanted):
        return True
    times, rest = divmod(len(found), len(wanted))
    return times > 0 and not rest and bool((found.reshape(times, -1) == wanted).all())


def _texts(value: Any) -> Iterator[str]:
    """All strings of a chat."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


@lru_cache(maxsize=64)
def _kept(source: str, level: int) -> re.Pattern[str] | None:
    """What of a string stays as it is: what the template itself speaks of."""
    if level == 0:
        return None
    spoken = set(re.findall(_TAG, source))
    if level > 1:
        quoted = re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", source)
        spoken.update(re.findall(r"\w{2,}", " ".join("".join(pair) for pair in quoted)))
    longest = sorted(spoken, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")
