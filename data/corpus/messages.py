"""Reads chats, tools and tool calls from the usual formats into the one that chat templates expect.

A tool call becomes `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .document import BadRowError, canonical, checked_text, listed, parse_json, parsed, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .columns import Columns

_ARGUMENTS = ("arguments", "parameters", "args", "input")
_BESIDE_ARGUMENTS = (
    *_ARGUMENTS, "name", "function", "type", "id", "index", "description", "strict",
)  # fmt: skip
"""Keys of a call that do not hold arguments under another name."""
_TAGGED = re.compile(r"<(tool_calls?|function_calls?)>(.*?)</\1>", re.DOTALL)


def read_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """The calls in a value: a list, a single call, or either as JSON. Raises BadRowError if an item
    is not a call."""
    value = parsed(value)
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    return [_call(where, parsed(item)) for item in items if item is not None]


def read_written_calls(where: str, text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before tool calls that are written as text, and the calls.

    The calls are JSON, one per line, in a list, or each in tags such as `<tool_call>`.

    Raises
        BadRowError: the text is not JSON, or not a call
    """
    tagged = list(_TAGGED.finditer(text))
    before = text[: tagged[0].start()].strip() if tagged else ""
    left = _TAGGED.sub("", text[tagged[0].start() :]).strip() if tagged else ""
    if left:
        raise _broken(where, f"has {shown(left)} after its call")
    calls: list[dict[str, Any]] = []
    for written in [match[2] for match in tagged] or [text]:
        for value in _json_values(where, written):
            calls += read_calls(where, value)
    if not calls:
        raise _broken(where, f"has no tool call in {shown(text)}")
    return before, calls


def read_tools(where: str, value: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list, a single tool, either as JSON, or a list of JSON texts. Raises
    BadRowError if an item is not a tool."""
    value = parsed(value)
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(_tool(where, parsed(item)) for item in items if item is not None)


def read_texts(where: str, value: Any) -> tuple[dict[str, Any], ...]:
    """The documents that a chat refers to: objects or texts, in a list or alone. Raises BadRowError
    if an item is neither."""
    value = parsed(value)
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else [value]
    found = []
    for item in (parsed(item) for item in items if item is not None):
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            fault = f"holds {shown(item)}, expected an object or a text; repair the row"
            raise BadRowError("wrong_values", where, fault)
        found.append(canonical(where, item))
    return tuple(found)


def _call(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise _broken(where, f"{shown(item)} is not a tool call")
    item = {key: value for key, value in item.items() if value is not None}
    function = parsed(item.get("function"))
    if isinstance(function, dict):
        outer = {key: value for key, value in item.items() if key not in ("function", *_ARGUMENTS)}
        beside = {key: item[key] for key in _ARGUMENTS if key in item}
        function = {**beside, **_without_null(function)}
    else:  # the keys of the function beside an optional `type` and `id`
        function = {**item, **({} if function is None else {"name": function})}
        outer = {key: item[key] for key in ("type", "id") if key in item}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _broken(where, f"a tool call without a name: {shown(item)}")
    key = next((key for key in _ARGUMENTS if function.get(key) is not None), "arguments")
    unknown = [name for name in function if name not in _BESIDE_ARGUMENTS]
    if unknown and key not in function:  # the call would lose these values
        raise _broken(
            where,
            f"a tool call without arguments: {shown(item)} has {listed(unknown)}, expected "
            f"{', '.join(_ARGUMENTS[:-1])} or {_ARGUMENTS[-1]}",
        )
    arguments = function.get(key) or {}
    as_object = parsed(arguments)
    if isinstance(as_object, dict):
        arguments = as_object
    called = canonical(where, {"name": name, "arguments": arguments})
    called.setdefault("arguments", {})
    return dict(canonical(where, {"type": "function", **outer, "function": called}))


def _tool(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise _broken(where, f"{shown(item)} is not a tool, expected an object")
    item = {key: parsed(value) if key == "function" else value for key, value in item.items()}
    if item.get("function") is None and item.get("name") is not None:
        item = {"type": "function", "function": {**item, "function": None, "type": None}}
    if isinstance(item.get("function"), dict):
        function = item["function"]
        if isinstance(function.get("parameters"), str):
            function = {**function, "parameters": parsed(function["parameters"])}
        item = {"type": "function", **_without_null(item), "function": function}
    return dict(canonical(where, item))


def _without_null(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}


def _json_values(where: str, text: str) -> list[Any]:
    """One JSON value, or one on each line."""
    try:
        return [parse_json(text)]
    except (ValueError, RecursionError) as error:
        try:
            return [parse_json(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            reason = f"{shown(text)} is not the JSON of a tool call: {error}"
            raise _broken(where, reason) from error


def _broken(where: str, reason: str) -> BadRowError:
    return BadRowError("broken_tool_calls", where, f"{reason}; repair the row")


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
    """The messages of a column; none for null. Raises BadRowError if the value is not a list of
    messages, or a message is incomplete."""
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
    """The text of a column; empty for null. Raises BadRowError if the value is not a text."""
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
            f"no {missing!r} (have: {listed(left)}); map it in the recipe: "
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
    both = [*read_calls(where, calls), *read_calls(where, _old_call(old_call))]
    if both:
        found["tool_calls"] = both
    return found


def _old_call(call: Any) -> Any:
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
