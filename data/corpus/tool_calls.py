"""Converts tools and tool calls from the usual formats to the one that chat templates expect.

A call is `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
"""

from __future__ import annotations

import re
from typing import Any

from .bad_rows import BadRowError
from .values import canonical, parse_json, parsed, printable, shown

_ARGUMENTS = ("arguments", "parameters", "args", "input")
_BESIDE_ARGUMENTS = (
    *_ARGUMENTS, "name", "function", "type", "id", "index", "description", "strict",
)  # fmt: skip
"""Keys of a call that do not hold arguments under another name."""
_TAGGED = re.compile(r"<(tool_calls?|function_calls?)>(.*?)</\1>", re.DOTALL)


def read_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """The calls in a value: a list, a single call, or either as JSON.

    Raises
        BadRowError: an item is not a call
    """
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
    """The tools of a row: a list, a single tool, either as JSON, or a list of JSON texts.

    Raises
        BadRowError: an item is not a tool
    """
    value = parsed(value)
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(_tool(where, parsed(item)) for item in items if item is not None)


def read_texts(where: str, value: Any) -> tuple[dict[str, Any], ...]:
    """The documents that a chat refers to: objects or texts, in a list or alone.

    Raises
        BadRowError: an item is neither
    """
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
        function = {**beside, **_filled(function)}
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
            f"a tool call without arguments: {shown(item)} has {printable(unknown)}, expected "
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
        item = {"type": "function", **_filled(item), "function": function}
    return dict(canonical(where, item))


def _filled(item: dict[str, Any]) -> dict[str, Any]:
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
