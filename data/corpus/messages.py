"""Reads the messages of a chat from the usual formats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .bad_rows import BadRowError
from .tool_calls import read_calls, read_written_calls
from .values import canonical, checked_text, parsed, printable, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .columns import Columns

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""Names of roles, with the role of each. A `function_call` holds a tool call of the assistant."""


def read_chat(where: str, name: str, value: Any, columns: Columns) -> tuple[Message, ...]:
    """The messages of a column; none for null.

    Raises
        BadRowError: the value is not a list of messages, or a message is incomplete
    """
    if value is None:
        return ()
    messages = parsed(value)
    if not isinstance(messages, list):
        fault = f"column {name!r} holds {shown(messages)}, expected a list of messages; repair it"
        raise BadRowError("wrong_values", where, fault)
    found: list[Message] = []
    for index, item in enumerate(messages):
        message = _message(f"{where}: {name}[{index}]", parsed(item), columns)
        calls_only = message["role"] == "function_call"
        if calls_only:
            message["role"] = "assistant"
        if calls_only and not message["content"] and found and found[-1]["role"] == "assistant":
            # one turn: the text and the call of the assistant follow each other
            calls = [*found[-1].get("tool_calls", ()), *message.pop("tool_calls")]
            found[-1] = {**found[-1], "tool_calls": calls}
        else:
            found.append(message)
    return tuple(found)


def read_string(where: str, name: str, value: Any) -> str:
    """The text of a column; empty for null.

    Raises
        BadRowError: the value is not a text
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        fault = f"column {name!r} holds {shown(value)}, expected a string; repair the row"
        raise BadRowError("wrong_values", where, fault)
    return checked_text(where, value, f"column {name!r}")


def _message(where: str, message: Any, columns: Columns) -> Message:
    if not isinstance(message, dict):
        fault = f"{shown(message)} is not a message, expected an object; repair the row"
        raise BadRowError("wrong_values", where, fault)
    # A table gives each message the keys of all messages; null ones were not written.
    left = {key: value for key, value in message.items() if value is not None}
    role_key = _key(left, columns.role, "role", "from")
    content_key = _key(left, columns.content, "content", "value")
    # A null content, or none beside a tool call, is an empty text.
    is_empty = columns.content in message or "tool_calls" in left or "function_call" in left
    if role_key not in left or (content_key not in left and not is_empty):
        missing = role_key if role_key not in left else content_key
        raise BadRowError(
            "incomplete_rows",
            where,
            f"no {missing!r} (have: {printable(left)}); map it in the recipe: "
            f'[corpus.columns] {"role" if missing == role_key else "content"} = "..."',
        )
    role = _role(where, read_string(where, role_key, left.pop(role_key)), columns)
    content, calls = left.pop(content_key, ""), left.pop("tool_calls", None)
    old_call = left.pop("function_call", None)
    found: Message = {"role": role}
    if role == "function_call":
        content = content if isinstance(content, str) else json.dumps(canonical(where, content))
        content, written = read_written_calls(where, checked_text(where, content))
        calls = [*read_calls(where, calls), *written]
    found["content"] = _content(where, content_key, content)
    found |= canonical(where, left)
    both = [*read_calls(where, calls), *read_calls(where, _filled(old_call))]
    if both:
        found["tool_calls"] = both
    return found


def _filled(call: Any) -> Any:
    """A call in the older format of OpenAI; None if all its values are null, as in a table."""
    call = parsed(call)
    return None if isinstance(call, dict) and not any(call.values()) else call


def _role(where: str, name: str, columns: Columns) -> str:
    if name in columns.roles:
        return _ROLES.get(columns.roles[name], columns.roles[name])
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise BadRowError(
            "unknown_roles",
            where,
            f"unknown role {name!r}; known are {', '.join(_ROLES)}; map it in the recipe: "
            f'[corpus.columns] roles = {{ {json.dumps(name, ensure_ascii=False)} = "..." }}',
        )
    return role


def _content(where: str, name: str, value: Any) -> str | list[dict[str, Any]]:
    """A text, or a list of text parts."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return read_string(where, name, value)
    parts = []
    for part in value:
        kind = part.get("type") or "text"
        if kind != "text" or not isinstance(part.get("text"), str):
            held = f"type {kind!r}"
            if kind == "text":
                held = f"text that holds {shown(part.get('text'))}"
            fault = f"column {name!r} has a part of {held}, only text is read; repair the row"
            raise BadRowError("wrong_values", where, fault)
        parts.append(canonical(where, {**part, "type": "text"}))
    return parts


def _key(message: Mapping[str, Any], key: str, default: str, other: str) -> str:
    """`key`, or the other usual key if `key` is unmapped and missing."""
    return other if key == default and key not in message and other in message else key
