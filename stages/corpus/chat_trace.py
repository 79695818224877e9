"""Finds the message from which each character of a rendered chat comes.

Templates are programs: they trim, drop, reorder and repeat text. Searching a message in their
output fails if the same text occurs twice. So a chat is rendered a second time, with its characters
replaced by unique characters of Unicode's private use areas. If restoring the original characters
gives the first rendering, then each replaced character shows which string of the chat is there.
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
"""Private use characters in planes 15 and 16; two code points of this range are not characters."""

_REPLACED = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_ESCAPED = frozenset('"\\')
"""Characters that JSON escapes, so replacing them would change the surrounding text."""

_TAG = r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,40}\]|(?<![\w/<])/\w+"
_THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?</\1>|\[THINK\].*?\[/THINK\]"
    r"|\A(?:(?!<think>).)*?</think>",  # the generation prompt may have opened it
    re.DOTALL,
)

LEVELS = 3
"""Levels of replacement. A template may search messages for tags such as `</think>`, or for words.
Level 0 replaces everything, level 1 keeps tags, level 2 also keeps words."""


class Piece(NamedTuple):
    """One string of a chat."""

    message: int
    kind: str
    """`content`, `thoughts` or `tool call`."""
    codes: NDArray[np.uint32]
    """The replacement characters of the string, in order, without characters that are kept."""
    unthought: NDArray[np.uint32]
    """`codes` without the thoughts inside a content."""


@dataclass(frozen=True, slots=True)
class MessageSpan:
    """The place of a message in a rendered chat."""

    begin: int
    end: int
    before: str
    """The template's text between the previous message and this one."""
    after: str
    """The template's text between this message and the next one."""


class TracedChat:
    """A chat whose characters are replaced by unique ones."""

    def __init__(self, chat: Chat, source: str, level: int) -> None:
        """Replace the characters of `chat`.

        source  source of the template, to find the tags and words that it searches for
        """
        self._kept = _kept(source, level)
        self._all = level == 0
        self._originals: dict[int, str] = {}
        self._owners: list[int] = []
        self.pieces: list[Piece] = []
        texts = list(_texts(chat.messages))
        self._foreign = set(map(ord, _REPLACED.findall("".join(texts))))
        self._quota = _ROOM // max(1, len(texts)) - 1
        self._next = _FIRST
        self.chat = replace(
            chat, messages=tuple(self._message(i, m) for i, m in enumerate(chat.messages))
        )

    def restore(self, text: str) -> str:
        """A rendering of the replaced chat with the original characters."""
        return text.translate(self._originals)

    def missing(self, text: str) -> tuple[list[Piece], list[Piece]]:
        """Strings that a rendering lacks, and strings of which it lacks only the thoughts."""
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

    def spans(self, text: str) -> dict[int, MessageSpan | None]:
        """Index of a message -> its span in the restored `text`; None if it is not one span."""
        codes = _codes(text)
        owners = np.full(len(codes), -1)
        for piece, places in zip(self.pieces, self._places(codes), strict=True):
            # a repeated string (a tool's name before its answer) belongs to the template
            owners[places[: len(piece.codes)]] = piece.message
        empty = [code for code, original in self._originals.items() if not original]
        lengths = np.where(np.isin(codes, empty), 0, 1)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        owned = np.flatnonzero(owners >= 0)
        messages = owners[owned]
        firsts = np.flatnonzero(np.diff(messages, prepend=-1))
        whole, found = self.restore(text), dict[int, MessageSpan | None]()
        for first, following in pairwise([*firsts, len(owned)]):
            message = int(messages[first])
            begin, end = int(begins[owned[first]]), int(ends[owned[following - 1]])
            left = ends[owned[first - 1]] if first else 0
            right = begins[owned[following]] if following < len(owned) else len(whole)
            span = MessageSpan(begin, end, whole[left:begin], whole[end:right])
            found[message] = None if message in found else span
        return found

    def _places(self, codes: NDArray[np.uint32]) -> list[NDArray[np.int64]]:
        """Positions of the characters of each string in a rendering."""
        table = np.full(self._next - _FIRST + 1, -1)  # the last entry is for other characters
        for code, piece in zip(self._originals, self._owners, strict=True):
            table[code - _FIRST] = piece
        rows = codes.astype(np.int64) - _FIRST
        pieces = table[np.where((rows < 0) | (rows >= len(table)), -1, rows)]
        order = np.argsort(pieces, kind="stable")
        bounds = np.searchsorted(pieces[order], np.arange(len(self.pieces) + 1))
        return [order[begin:end] for begin, end in pairwise(bounds)]

    def _message(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        traced, before = dict(message), len(self.pieces)
        for key in THOUGHTS:
            if isinstance(message.get(key), str):
                traced[key] = self._replace(i, "thoughts", message[key])
        if message.get("tool_calls"):
            traced["tool_calls"] = [self._call(i, call) for call in message["tool_calls"]]
        if isinstance(message.get("content"), list):
            traced["content"] = [
                part | {"text": self._replace(i, "content", part["text"])}
                for part in message["content"]
            ]
        if isinstance(message.get("content"), str):
            traced["content"] = self._replace(i, "content", message["content"])
            is_empty = not any(len(piece.codes) for piece in self.pieces[before:])
            if is_empty and message["role"] != "system":  # mark the place of the empty message
                code = self._code("", len(self.pieces))
                codes = np.array([code], np.uint32)
                self.pieces.append(Piece(i, "content", codes, codes))
                traced["content"] += chr(code)
        return traced

    def _call(self, i: int, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(i, call["function"])}
        traced = dict(call)
        if isinstance(call.get("name"), str):
            traced["name"] = self._replace(i, "tool call", call["name"])
        if "arguments" in call:
            traced["arguments"] = self._argument(i, call["arguments"])
        return traced

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
        """The string with replaced characters, which is added to `pieces`."""
        table: dict[int, int] = {}
        owner = len(self.pieces)
        # both ends first: they locate the string even if the quota allows no more characters
        ends = text.strip()
        for character in dict.fromkeys(ends[:1] + ends[-1:] + text):
            if len(table) < self._quota and self._is_replaced(character):
                table[ord(character)] = self._code(character, owner)
        parts, position = [], 0
        for kept in self._kept.finditer(text) if self._kept else ():
            parts += [text[position : kept.start()].translate(table), kept.group()]
            position = kept.end()
        traced = "".join([*parts, text[position:].translate(table)])
        codes = _codes(traced)
        is_replaced = codes >= _FIRST
        is_answer = np.ones(len(codes), np.bool_)
        for thought in _THOUGHT.finditer(text):
            is_answer[thought.start() : thought.end()] = False
        self.pieces.append(Piece(i, kind, codes[is_replaced], codes[is_replaced & is_answer]))
        return traced

    def _is_replaced(self, character: str) -> bool:
        if character.isspace() or character in _ESCAPED or ord(character) < 32:
            return False
        return self._all or character.isalnum() or ord(character) >= _FIRST

    def _code(self, original: str, owner: int) -> int:
        """An unused replacement for a character of piece `owner`."""
        while self._next in self._foreign or self._next & 0xFFFE == 0xFFFE:
            self._next += 1
        code = self._next
        self._next += 1
        self._originals[code] = original
        self._owners.append(owner)
        return code


def text_after_last(text: str) -> str:
    """The text after the last replaced character of a rendering."""
    found = _REPLACED.search(text[::-1])
    return text[len(text) - found.start() :] if found else text


def text_before_first(text: str) -> str:
    """The text before the first replaced character of a rendering."""
    found = _REPLACED.search(text)
    return text[: found.start()] if found else text


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _is_repeated(found: NDArray[np.uint32], wanted: NDArray[np.uint32]) -> bool:
    """Whether `found` is `wanted`, repeated one or more times."""
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
    """Matches the text that must not be replaced at a level: tags and words of the template."""
    if level == 0:
        return None
    named = set(re.findall(_TAG, source))
    if level > 1:
        quoted = re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", source)
        named.update(re.findall(r"\w{2,}", " ".join("".join(pair) for pair in quoted)))
    longest = sorted(named, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")
