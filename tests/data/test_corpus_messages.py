"""Chats in the usual formats become one format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.document import BadRowError
from coldstill.data.corpus.messages import read_chat

Message = dict[str, Any]


def chat_of(*messages: Any, **columns: Any) -> tuple[Message, ...]:
    return read_chat("a.jsonl:7", "chat", list(messages), Columns(**columns))


def bad_row(*messages: Any) -> tuple[str, str]:
    """The kind and the message of the error."""
    with pytest.raises(BadRowError) as caught:
        chat_of(*messages)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("a.jsonl:7: chat[")
    return caught.value.kind, str(caught.value)


def call(name: str, arguments: Any = None, **other: Any) -> Message:
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {"type": "function", **other, "function": function}


def test_the_usual_names_of_roles_are_recognised() -> None:
    for role, names in {
        "user": ("user", "human", "User", " human ", "prompter"),
        "assistant": ("assistant", "gpt", "bot", "chatgpt", "model", "ai", "ASSISTANT"),
        "tool": ("tool", "function", "observation", "ipython", "tool_response"),
        "system": ("system",),
        "developer": ("developer",),
    }.items():
        for name in names:
            assert chat_of({"from": name, "value": "x"}) == ({"role": role, "content": "x"},)


def test_an_unknown_role_is_a_bad_row_unless_it_is_mapped() -> None:
    kind, message = bad_row({"from": "human", "value": "a"}, {"from": "narrator", "value": "b"})
    assert kind == "unknown_roles"
    assert "chat[1]: unknown role 'narrator'; known are system, developer, user, " in message
    assert 'map it in the recipe: [corpus.columns] roles = { "narrator" = "..." }' in message
    roles = {"narrator": "gpt", "critic": "critic", "human": "system", "act": "function_call"}
    text = '{"name": "f"}'
    assert chat_of(*({"from": name, "value": text} for name in roles), roles=roles) == (
        {"role": "assistant", "content": text},
        {"role": "critic", "content": text},
        {"role": "system", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call("f")]},
    )


WRITTEN: Message = {"name": "f", "arguments": {"b": 1, "a": "x"}}


def test_a_turn_that_calls_a_tool_becomes_a_tool_call() -> None:
    for value in (
        json.dumps(WRITTEN),
        WRITTEN,
        [WRITTEN],
        json.dumps([WRITTEN]),
        json.dumps({"name": "f", "parameters": WRITTEN["arguments"]}),
        json.dumps({"name": "f", "arguments": json.dumps(WRITTEN["arguments"])}),
        json.dumps({"type": "function", "function": WRITTEN}),
        f"<tool_call>\n{json.dumps(WRITTEN)}\n</tool_call>",
    ):
        chat = chat_of(
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "3"},
        )
        assert chat == (
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": "x", "b": 1})]},
            {"role": "tool", "content": "3"},
        )
        assert '"arguments": {"a": "x", "b": 1}' in json.dumps(chat)
    for value in (
        [{"name": "f"}, {"name": "g"}],
        '[{"name": "f"}, {"name": "g"}]',
        '{"name": "f"}\n{"name": "g"}',
        '<tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g"}</tool_call>',
    ):
        (message,) = chat_of({"from": "function_call", "value": value})
        assert message["tool_calls"] == [call("f"), call("g")]


def test_calls_directly_after_a_text_of_the_assistant_belong_to_its_turn() -> None:
    first, second = ({"from": "function_call", "value": f'{{"name": "{n}"}}'} for n in "fg")
    text = {"from": "gpt", "value": "wait"}
    assert chat_of(text, first, second, text) == (
        {"role": "assistant", "content": "wait", "tool_calls": [call("f"), call("g")]},
        {"role": "assistant", "content": "wait"},
    )
    thought = {"from": "function_call", "value": 'hm <tool_call>{"name": "f"}</tool_call>'}
    assert chat_of(text, thought)[1] == {
        "role": "assistant", "content": "hm", "tool_calls": [call("f")]
    }  # fmt: skip


def test_a_function_call_without_a_call_is_a_bad_row() -> None:
    for value, expected in {
        "{'name': 'f'}": "is not the JSON of a tool call: Expecting property name",
        "I call f": "is not the JSON of a tool call",
        "3": "int 3 is not a tool call",
        "": "has no tool call in str ''",
        "[]": "has no tool call in str '[]'",
        '{"arguments": {}}': "a tool call without a name: dict {'arguments': {}}",
        '<tool_call>{"name": "f"}</tool_call> and so on': "has str 'and so on' after its call",
        '{"name": "f", "name": "g"}': "an object with the key 'name' twice is not a tool call",
    }.items():
        kind, message = bad_row({"from": "function_call", "value": value})
        assert kind == "broken_tool_calls"
        assert expected in message


def test_tool_calls_have_one_form() -> None:
    items: list[Any] = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "1", "type": None, "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "1", "name": "f", "arguments": {"x": 1.0, "y": None}},
        {"id": "1", "function": "f", "arguments": {"x": 1}},
        {"id": "1", "type": "function", "name": "f", "input": {"x": 1}},
        {"id": "1", "function": {"name": "f", "arguments": None}, "arguments": {"x": 1}},
        '{"id": "1", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
    ]
    for item in items:
        for calls in ([item], json.dumps([item]), [item, None]):
            message = {"role": "assistant", "content": None, "tool_calls": calls}
            assert chat_of(message)[0]["tool_calls"] == [call("f", {"x": 1}, id="1")]


def test_a_call_with_arguments_under_an_unknown_name_is_a_bad_row() -> None:
    for item in ({"name": "f", "kwargs": {"x": 1}}, {"function": {"name": "f", "kwargs": {}}}):
        kind, message = bad_row({"role": "assistant", "content": None, "tool_calls": [item]})
        assert kind == "broken_tool_calls"
        assert "has kwargs, expected arguments, parameters, args or input; repair" in message
    unfilled: Message = {"function": {"name": "f", "arguments": {}, "parsed_arguments": None}}
    kept = chat_of({"role": "assistant", "content": None, "tool_calls": [unfilled]})
    assert kept[0]["tool_calls"] == [call("f")]


def test_odd_arguments_are_kept_and_empty_calls_dropped() -> None:
    for written, kept in [("x = 1", "x = 1"), ("", {}), ([], {}), ([1], [1]), ("[1]", "[1]")]:
        calls = [{"name": "f", "arguments": written}]
        (message,) = chat_of({"role": "assistant", "content": "", "tool_calls": calls})
        assert message["tool_calls"] == [call("f", kept)]
    empties: list[Any] = [[], None, "[]", "null"]
    for empty in empties:
        message = {"role": "assistant", "content": "x", "tool_calls": empty}
        assert chat_of(message) == ({"role": "assistant", "content": "x"},)


def test_the_old_call_of_openai_becomes_a_tool_call_and_its_role_a_tool() -> None:
    chat = chat_of(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "3"},
        {"role": "assistant", "content": "3", "function_call": {"name": None, "arguments": None}},
    )
    assert chat == (
        {"role": "assistant", "content": "", "tool_calls": [call("f")]},
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "assistant", "content": "3"},
    )


def test_text_parts_of_a_content_are_kept() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": None, "text": "b"}]
    assert chat_of({"role": "user", "content": parts})[0]["content"] == [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    ]  # fmt: skip
    for part, message in (
        ({"type": "image_url", "image_url": "x"}, "has a part of type 'image_url', only text is"),
        ({"type": "text", "text": 3}, "has a part of text that holds int 3, only text is read"),
    ):
        assert message in bad_row({"role": "user", "content": [part]})[1]
