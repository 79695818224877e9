"""Locates the parts of a rendered chat that are to be learned: the assistant's turns.

A turn begins after the generation prompt, as far as the turn starts with it, and ends with the last
character of its closing text. The header of the next message and the white space before it are not
learned, because no model has to generate them. If a template marks the answers itself
(`{% generation %}`), only marked text and the token that ends a turn are learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .chat_template import Chat, Spans, in_parts
from .chat_trace import text_after_last, text_before_first

if TYPE_CHECKING:
    from .chat_template import ChatTemplate
    from .chat_trace import MessageSpan

_WHOLE = re.compile(r"<[^<>]*>?|\[[^\[\]]*\]?|\w+")
"""A tag or a word, which the edge of a turn never cuts."""
_KNOWN = 4096
"""Most texts around turns whose edges are kept in memory. A corpus has few."""
_ASKED, _ANSWERED = "\U0010fffd", "\U0010fffc"
"""Contents of the user and the assistant in test chats. A traced chat never contains them."""


@dataclass(frozen=True, slots=True)
class TurnEdges:
    """The parts of the text around a turn that are its header and its closing."""

    header: int
    """Characters of the text before the turn that are its header; the rest belongs to the turn."""
    closing: int
    """Characters of the text after the turn that close it."""
    is_ended: bool
    """Whether the closing ends in a token that ends a turn."""


Turn = tuple[Spans, bool]
"""The spans to learn of a turn, and whether a token ends it."""


class TurnFinder:
    """Locates turns; the edges of equal surroundings are computed once."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._known: dict[tuple[Any, ...], TurnEdges | None] = {}

    def find(self, chat: Chat, i: int, span: MessageSpan, marked: Spans | None) -> Turn | None:
        """Turn `i` of a traced chat; None if its header cannot be separated from it.

        marked  spans that the template marks as the assistant's; None if it marks nothing
        """
        key = (
            self._template.source(chat), span.before, span.after,
            chat.role(i - 1), chat.role(i + 1),
        )  # fmt: skip
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[key] = _Surroundings(self._template, chat, i, span).edges()
        edges = self._known[key]
        if edges is None:
            return None
        begin = span.begin - len(span.before) + edges.header
        end = span.end + edges.closing
        if marked is None:
            return [(begin, end)], edges.is_ended
        spans = [(max(b, begin), min(e, end)) for b, e in marked if b <= span.end and e >= begin]
        if spans and spans[-1][1] >= span.end:
            spans[-1] = (spans[-1][0], end)
        return spans, edges.is_ended


class _Surroundings:
    """The template's text around one turn, analysed by rendering other chats."""

    def __init__(self, template: ChatTemplate, chat: Chat, i: int, span: MessageSpan) -> None:
        self._template, self._chat, self._i = template, chat, i
        self._before, self._after = span.before, span.after
        self._question = self._message("user", _ASKED)
        self._asked = self._text_after(chat[:i], prompt=True) if i else None
        self._context = chat[:i]
        if self._asked is None:  # the chat begins with the assistant: put a question before it
            self._context = replace(chat, messages=(*chat.messages[:i], self._question))
            self._asked = self._text_after(self._context, prompt=True)
        self._prompt = self._asking()

    def edges(self) -> TurnEdges | None:
        header = self._header()
        return None if header is None else TurnEdges(header, *self._closing())

    def _header(self) -> int | None:
        before, asked = self._before, self._asked
        if asked is None:
            return None
        if self._context.messages[-1] is self._question:
            # find the beginning of the turn after the added question, then here
            rest = (*self._context.messages, *self._chat.messages[self._i :])
            written = self._written(replace(self._chat, messages=rest))
            if written is None:
                return None
            own = self._own(text_before_first(written.rpartition(_ASKED)[2]), asked)
            header = len(before) - len(own) if before.endswith(own) else None
        else:
            header = len(before) - len(self._own(before, asked))
        if self._prompt.strip() and self._prompt in before:
            header = max(header or 0, before.rindex(self._prompt) + len(self._prompt))
        is_found = header or not before.strip() or self._chat.role(self._i - 1) == "assistant"
        return header if is_found else None

    def _asking(self) -> str:
        """The generation prompt without the closing of the message before it."""
        context = self._context
        if context.messages[-1]["role"] == "assistant":
            # some templates close the last answer of a chat differently
            context = replace(context, messages=(*context.messages, self._question))
        asked = self._text_after(context, prompt=True)
        if asked is None:
            context, asked = self._context, self._asked
        return (asked or "")[_agreed(asked or "", self._text_after(context) or "") :]

    def _own(self, before: str, asked: str) -> str:
        """The part of the text before a turn that belongs to the turn and not to `asked`."""
        own = before[_agreed(before, asked) :]
        if self._prompt or not own.strip():
            return own
        # there is no generation prompt: the header is the text before any answer
        answer = self._message("assistant", _ANSWERED)
        written = self._written(Chat((self._question, answer)))
        if written is None:
            return own
        plain = written.rpartition(_ASKED)[2].partition(_ANSWERED)[0]
        prompted = self._text_after(Chat((self._question,)), prompt=True) or ""
        plain = plain[_agreed(plain, prompted) :]
        return own[_agreed(own, plain) :] if plain.strip() else own

    def _closing(self) -> tuple[int, bool]:
        """Characters after the turn that close it, and whether they end in an end token."""
        through = (*self._context.messages, self._chat.messages[self._i])
        ended = replace(self._chat, messages=through)
        stated = self._text_after(ended)
        asked = self._text_after(ended, prompt=True)
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
            # some templates end all turns except the last one
            closing, is_ended = closing + rest[: rest.index(eos) + len(eos)], True
        return len(closing), is_ended

    def _before_header(self) -> str:
        """The single tag between a turn and the next header; empty if there is none.

        Some templates close the last turn of a chat differently from the others.
        """
        header = _WHOLE.match(self._prompt.lstrip())
        if header is None or header[0] not in self._after:
            return ""
        end = self._after.partition(header[0])[0].rstrip()
        is_tag = _WHOLE.fullmatch(end.lstrip()) and self._template.ends_turn(end)
        return end if is_tag else ""

    def _message(self, role: str, content: str) -> dict[str, Any]:
        """A message in the same form as those of the chat."""
        message = {"role": role, "content": content}
        has_parts = any(isinstance(m["content"], list) for m in self._chat.messages)
        return in_parts(message) if has_parts else message

    def _text_after(self, chat: Chat, *, prompt: bool = False) -> str | None:
        """The template's text after the last message of a chat; None if it cannot be located."""
        text = self._written(chat, prompt=prompt)
        found = None if text is None else text_after_last(text)
        return None if found == text else found

    def _written(self, chat: Chat, *, prompt: bool = False) -> str | None:
        try:
            return self._template.write(chat, prompt=prompt)[0]
        except Exception:  # templates refuse chats with any class of exception
            return None


def _agreed(text: str, other: str) -> int:
    """Length of the common beginning of two texts, without cutting a tag or word of `text`."""
    if text.startswith(other):
        return len(other)
    common = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    if common is None:  # `other` continues where `text` ends
        return len(text)
    for found in _WHOLE.finditer(text):
        if found.start() < common < found.end():
            return found.start()
    return common
