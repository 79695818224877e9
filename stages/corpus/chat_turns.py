"""Where in a rendered chat the assistant speaks.

A turn begins behind what the template writes to ask for an answer (the generation prompt), as far
as the turn begins with it, and ends with the last character of the text that closes it: neither the
header of the next message nor the white space before that is ever asked of a model. Where a
template marks the answers itself (`{% generation %}`), nothing outside of these marks is learned,
except for the token that ends a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .chat_template import Chat, in_parts
from .chat_trace import Tinted, before_first, behind_last

if TYPE_CHECKING:
    from .chat_template import ChatTemplate, Spans
    from .chat_trace import Stretch

_WHOLE = re.compile(r"<[^<>]*>?|\[[^\[\]]*\]?|\w+")
"""What a border never cuts: a tag, a word."""
_KNOWN = 4096
"""Surroundings of turns that are remembered. A corpus has few."""
_ASKED, _ANSWERED = "\U0010fffd", "\U0010fffc"
"""What a user and an assistant say in chats of our own. The characters are none of the chat's."""


@dataclass(frozen=True, slots=True)
class Borders:
    """What of the text around a turn belongs to the turn."""

    header: int
    """Characters before it that ask for it; the rest of those are the turn's own."""
    closing: int
    """Characters behind it that end it."""
    is_ended: bool
    """Whether those end in a token that ends a turn."""


class TurnFinder:
    """Finds turns, and remembers what it found around them."""

    def __init__(self, template: ChatTemplate) -> None:
        """Of this template."""
        self._template = template
        self._known: dict[tuple[Any, ...], Borders | None] = {}

    def find(
        self, tinted: Tinted, i: int, stretch: Stretch, marked: Spans | None
    ) -> tuple[Spans, bool] | None:
        """Where turn `i` is to be learned, and whether a token ends it; None if its header cannot
        be told from it.

        marked  what the template marks as said by the assistant
        """
        chat = tinted.chat
        key = (
            self._template.source(chat), stretch.before, stretch.after,
            chat.role(i - 1), chat.role(i + 1),
        )  # fmt: skip
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[key] = _Surroundings(self._template, tinted.chat, i, stretch).borders()
        borders = self._known[key]
        if borders is None:
            return None
        begin = stretch.begin - len(stretch.before) + borders.header
        end = stretch.end + borders.closing
        if marked is None:
            return [(begin, end)], borders.is_ended
        spans = [(max(b, begin), min(e, end)) for b, e in marked if b <= stretch.end and e >= begin]
        if spans and spans[-1][1] >= stretch.end:
            spans[-1] = (spans[-1][0], end)
        return spans, borders.is_ended


class _Surroundings:
    """What a template writes around one turn, asked by rendering other chats with it."""

    def __init__(self, template: ChatTemplate, chat: Chat, i: int, stretch: Stretch) -> None:
        self._template, self._chat, self._i = template, chat, i
        self._before, self._after = stretch.before, stretch.after
        self._question = self._message("user", _ASKED)
        self._asked = self._behind(chat[:i], prompt=True) if i else None
        self._context = chat[:i]
        if self._asked is None:  # the assistant speaks first: as if it had been asked
            self._context = replace(chat, messages=(*chat.messages[:i], self._question))
            self._asked = self._behind(self._context, prompt=True)
        self._prompt = self._asking()

    def borders(self) -> Borders | None:
        header = self._header()
        if header is None:
            return None
        closing, is_ended = self._closing()
        return Borders(header, closing, is_ended)

    def _header(self) -> int | None:
        before, asked = self._before, self._asked
        if asked is None:
            return None
        if self._context.messages[-1] is self._question:
            # find the turn's own beginning where it is asked for, and then here
            rest = (*self._context.messages, *self._chat.messages[self._i :])
            written = self._written(replace(self._chat, messages=rest))
            if written is None:
                return None
            own = self._own(before_first(written.rpartition(_ASKED)[2]), asked)
            header = len(before) - len(own) if before.endswith(own) else None
        else:
            header = len(before) - len(self._own(before, asked))
        if self._prompt.strip() and self._prompt in before:
            header = max(header or 0, before.rindex(self._prompt) + len(self._prompt))
        is_found = header or not before.strip() or self._chat.role(self._i - 1) == "assistant"
        return header if is_found else None

    def _asking(self) -> str:
        """What asks for an answer, without the end of the message before it."""
        context = self._context
        if context.messages[-1]["role"] == "assistant":
            # some templates end an answer in another way where nothing follows it
            context = replace(context, messages=(*context.messages, self._question))
        asked = self._behind(context, prompt=True)
        if asked is None:
            context, asked = self._context, self._asked
        return (asked or "")[_agreed(asked or "", self._behind(context) or "") :]

    def _own(self, before: str, asked: str) -> str:
        """What of the text before a turn is the turn's, given what asks for it."""
        own = before[_agreed(before, asked) :]
        if self._prompt or not own.strip():
            return own
        # the template does not ask: its header is what it writes before any answer
        answer = self._message("assistant", _ANSWERED)
        written = self._written(Chat((self._question, answer)))
        if written is None:
            return own
        plain = written.rpartition(_ASKED)[2].partition(_ANSWERED)[0]
        plain = plain[_agreed(plain, self._behind(Chat((self._question,)), prompt=True) or "") :]
        return own[_agreed(own, plain) :] if plain.strip() else own

    def _closing(self) -> tuple[int, bool]:
        through = (*self._context.messages, self._chat.messages[self._i])
        ended = replace(self._chat, messages=through)
        stated = self._behind(ended)
        asked = self._behind(ended, prompt=True)
        ends = [] if stated is None else [stated]
        if asked is not None and asked.endswith(self._prompt):
            ends.append(asked.removesuffix(self._prompt))
        ends = sorted((e for e in ends if e and self._after.startswith(e)), key=len)
        closing = next((e.rstrip() for e in ends if e.strip()), ends[0] if ends else "")
        closing = closing if closing.strip() else self._before_header() or closing
        eos = self._template.eos
        rest = self._after[len(closing) :]
        is_ended = self._template.ends_turn(closing)
        if eos and not is_ended and rest.lstrip().startswith(eos):
            # some templates end every turn but the last one
            closing, is_ended = closing + rest[: rest.index(eos) + len(eos)], True
        return len(closing), is_ended

    def _before_header(self) -> str:
        """The one tag between a turn and the next header, if there is one: some templates end a
        turn that others follow in another way than the last one."""
        header = _WHOLE.match(self._prompt.lstrip())
        if header is None or header[0] not in self._after:
            return ""
        end = self._after.partition(header[0])[0].rstrip()
        is_tag = _WHOLE.fullmatch(end.lstrip()) and self._template.ends_turn(end)
        return end if is_tag else ""

    def _message(self, role: str, content: str) -> dict[str, Any]:
        """A message in the form of the chat's own."""
        message = {"role": role, "content": content}
        has_parts = any(isinstance(m["content"], list) for m in self._chat.messages)
        return in_parts(message) if has_parts else message

    def _behind(self, chat: Chat, *, prompt: bool = False) -> str | None:
        """What the template writes behind the last message of a chat."""
        text = self._written(chat, prompt=prompt)
        found = None if text is None else behind_last(text)
        return None if found == text else found

    def _written(self, chat: Chat, *, prompt: bool = False) -> str | None:
        try:
            return self._template.write(chat, prompt=prompt)[0]
        except Exception:  # templates refuse chats in many ways; then this one tells nothing
            return None


def _agreed(text: str, other: str) -> int:
    """How many characters two texts begin with in common, whole tags and words of `text`."""
    if text.startswith(other):
        return len(other)
    common = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    if common is None:  # `other` goes on where `text` ends
        return len(text)
    for found in _WHOLE.finditer(text):
        if found.start() < common < found.end():
            return found.start()
    return common
