"""Rendering a tokenizer's chat template, and the forms of messages that templates expect."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..libraries import asking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ...data.corpus.document import Document

Spans = list[tuple[int, int]]
"""Begin and end of parts of a text, in characters."""

TODAY = datetime(2025, 1, 1)
"""The date for templates that ask for today's date, so that a corpus does not change every day."""

_ASKS_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_LAST_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\Z")
_MARKS_ANSWERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets store the thoughts of an assistant's message."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The input of a template."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()

    def __getitem__(self, part: slice) -> Chat:
        """The chat with a part of the messages."""
        return replace(self, messages=self.messages[part])

    def role(self, i: int) -> str:
        """The role of message `i`; empty if there is no such message."""
        return str(self.messages[i]["role"]) if 0 <= i < len(self.messages) else ""


class ChatTemplate:
    """Writes chats as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def eos(self) -> str:
        """The tokenizer's end of text; empty if it has none."""
        return str(self._tokenizer.eos_token or "")

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def source(self, chat: Chat) -> str:
        """Source of the template for a chat; a tokenizer may have a separate one for tools."""
        with asking(
            "transformers", "choose a chat template", where="the tokenizer's chat_template"
        ):
            return str(self._tokenizer.get_chat_template(tools=chat.tools or None))

    def writes_date(self, chat: Chat) -> bool:
        """Whether the template asks for today's date."""
        return bool(_ASKS_DATE.search(self.source(chat)))

    def write(self, chat: Chat, *, prompt: bool = False) -> tuple[str, Spans | None]:
        """A chat as text, and the spans that the template marks as the assistant's, if it does.

        prompt  whether to end with the generation prompt (`add_generation_prompt`)

        Raises
            Exception: any error that the template raises
        """
        source = self.source(chat)
        marks = bool(_MARKS_ANSWERS.search(source))
        texts, spans = render_jinja_template(
            conversations=[list(chat.messages)],
            tools=list(chat.tools) or None,
            documents=list(chat.documents) or None,
            chat_template=_ASKS_DATE.sub(lambda m: repr(TODAY.strftime(m[2])), source),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **self._tokenizer.special_tokens_map,
        )
        return str(texts[0]), list(spans[0]) if marks else None

    def ends_turn(self, closing: str) -> bool:
        """Whether the text after a turn ends in a token that ends turns."""
        if self.eos and closing.endswith(self.eos):
            return True
        tag = _LAST_TAG.search(closing)  # `</tool_call>` closes a part of a turn
        return tag is not None and not tag[1].startswith("</")

    def forms(self, document: Document) -> Iterator[Chat]:
        """The chat of a document in the forms that templates expect, the most common one first.

        Some templates serialise the arguments of a tool call themselves, others expect JSON text.
        Some want an empty content beside a tool call, others none. Templates of multimodal models
        may want a list of parts. A developer becomes the system if the template has no such role.
        """
        chat = Chat((), document.tools, document.documents)
        developer = "developer" if "developer" in self.source(chat) else "system"
        messages = [_usual(message, developer) for message in document.messages]
        calling = any(message.get("tool_calls") for message in messages)
        for form in (dict, in_parts):
            for empty in ("", None)[: 1 + calling]:
                for arguments in (_as_object, _as_text)[: 1 + calling]:
                    converted = (form(_calls(m, arguments, empty)) for m in messages)
                    yield replace(chat, messages=tuple(converted))


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a list with one part of text."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if content else []
    return message | {"content": parts if isinstance(content, str) else content}


def misquotes(usual: Chat, chat: Chat, text: str) -> bool:
    """Whether a template wrote the arguments of a tool call other than as JSON.

    It may write a Python object, or quote JSON text a second time.

    usual  the same chat with objects as arguments
    """
    for i, message in enumerate(chat.messages):
        calls = zip(
            message.get("tool_calls") or (), usual.messages[i].get("tool_calls") or (), strict=True
        )
        for call, usual_call in calls:
            given, value = _arguments(call), _arguments(usual_call)
            if not isinstance(given, str):
                wrong = any(str(v) in text and _json(v) not in text for v in _containers(given))
            else:
                wrong = given != value and _json(given) in text and given not in text
            if wrong:
                return True
    return False


def _containers(value: Any) -> Iterator[Any]:
    """All objects and lists of a value whose Python text differs from JSON."""
    if isinstance(value, dict | list):
        if str(value) != _json(value):
            yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function.get("arguments") if isinstance(function, dict) else None


def _usual(message: dict[str, Any], developer: str) -> dict[str, Any]:
    """The message with its content as one string and its thoughts under one key."""
    usual = dict(message)
    if usual["role"] == "developer":
        usual["role"] = developer
    content = usual.get("content")
    if isinstance(content, list) and is_text(content):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    elif isinstance(content, list | dict) and usual["role"] == "tool":
        content = _json(content)
    usual["content"] = "" if content is None else content
    # transformers passes thoughts to a template under all keys, even empty ones
    thoughts = next((usual[key] for key in THOUGHTS if usual.get(key)), None)
    usual = {k: v for k, v in usual.items() if k not in THOUGHTS or (v and v != thoughts)}
    return usual if thoughts is None else {THOUGHTS[0]: thoughts} | usual


def is_text(content: Any) -> bool:
    """Whether the content of a message is text: a string, parts of text, or empty."""
    parts = content if isinstance(content, list) else [content or ""]
    return all(
        isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))
        for part in parts
    )


def _calls(
    message: dict[str, Any], convert: Callable[[Any], Any], empty: str | None
) -> dict[str, Any]:
    """The message with converted arguments of its tool calls, and `empty` as an empty content."""
    calls: Sequence[Any] | None = message.get("tool_calls")
    if not calls:
        return message
    converted = [
        call | {"function": call["function"] | {"arguments": convert(_arguments(call))}}
        if isinstance(call, dict) and isinstance(call.get("function"), dict)
        else call
        for call in calls
    ]
    return message | {"tool_calls": converted, "content": message["content"] or empty}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return {} if arguments is None else arguments


def _as_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return _json({} if arguments is None else arguments)
