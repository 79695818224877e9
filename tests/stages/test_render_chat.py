"""Of a rendered chat exactly the assistant's turns are learned, up to the token that ends them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import chat_templates as t
import pytest
from chat_templates import dialogue, say
from coldstill.data.corpus.document import BadRowError, Document
from coldstill.data.errors import ColdstillError
from coldstill.stages.corpus.render_chat import ChatRenderer
from coldstill.stages.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coldstill.stages.corpus.render_chat import RenderedChat

EOS = "<|endoftext|>"
NO_THOUGHTS = "<think>\n\n</think>\n\n"


@pytest.fixture
def own(tokenizer_folder: Path) -> Any:
    """A tokenizer whose template a test may set."""
    return load_tokenizer(str(tokenizer_folder), "test")


def document(messages: Sequence[dict[str, Any]], **more: Any) -> Document:
    return Document(where="c.jsonl:3", messages=tuple(messages), **more)


def rendered(
    own: Any, template: str, messages: Sequence[dict[str, Any]], **more: Any
) -> RenderedChat:
    own.chat_template = template
    return ChatRenderer(own).render(document(messages, **more))


def learned(own: Any, template: str, messages: Sequence[dict[str, Any]]) -> list[str]:
    found = rendered(own, template, messages)
    return [found.text[begin:end] for begin, end in found.learned]


def refused(own: Any, template: str, messages: Sequence[dict[str, Any]], **more: Any) -> str:
    with pytest.raises(BadRowError) as error:
        rendered(own, template, messages, **more)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("c.jsonl:3: ")
    assert line.endswith(', or skip such rows with corpus.bad_rows = "skip"')
    return f"{error.value.kind}: {line}"


TWO, FIRST = ["Hello.<|end|>", "Sure.<|end|>"], ["Hello!<|end|>", "Hi.<|end|>"]
AGAIN = (*t.ONE, say("assistant", "Again."))
SPACES, PRIVATE = dialogue("Hi ", " Hello.\n"), "x\U000f0000 \U0010fffd"
CASES: dict[str, tuple[str, Sequence[dict[str, Any]], list[str]]] = {
    "plain": (t.PLAIN, t.WITH_SYSTEM, TWO),
    "first": (t.DEFAULT_SYSTEM, t.FIRST, FIRST),
    "alone": (t.DEFAULT_SYSTEM, t.FIRST[:1], FIRST[:1]),
    "trims": (t.TRIMS, SPACES, ["Hello.<|end|>"]),
    "keeps white space": (t.PLAIN, SPACES, [" Hello.\n<|end|>"]),
    "empty": (t.PLAIN, dialogue("Hi", ""), ["<|end|>"]),
    "quotes": (
        t.PLAIN, dialogue('a "Hi"', '"', "Hi", 'Hi"'), ['"<|end|>', 'Hi"<|end|>'],
    ),
    "two in a row": (t.PLAIN, AGAIN, ["Hello.<|end|>", "Again.<|end|>"]),
    "merged": (t.MERGES, AGAIN, ["Hello.", " Again.<|end|>"]),
    "same text elsewhere": (t.PLAIN, dialogue("assistant Hi", "Hi", "Hi"), ["Hi<|end|>"]),
    "tags of the template": (
        t.THINKS, dialogue("<|end|>?", "Is <|end|> <|assistant|>\n it?"),
        [f"{NO_THOUGHTS}Is <|end|> <|assistant|>\n it?<|end|>"],
    ),
    "thoughts": (
        t.THINKS, t.THOUGHTS, ["Hello.<|end|>", "<think>\ngo on\n</think>\n\nSure.<|end|>"],
    ),
    "empty thoughts": (t.THINKS, t.TWO, ["Hello.<|end|>", f"{NO_THOUGHTS}Sure.<|end|>"]),
    "prompt opens thoughts": (
        t.ASKS_THOUGHTS, t.THOUGHTS, ["Hello.<|end|>", "go on\n</think>\n\nSure.<|end|>"],
    ),
    "first, prompt opens thoughts": (
        t.ASKS_THOUGHTS, t.FIRST, ["Hello!<|end|>", "\n</think>\n\nHi.<|end|>"],
    ),
    "begins like the prompt": (
        t.ASKS_THOUGHTS, dialogue("Hi", "<th>"), ["\n</think>\n\n<th><|end|>"],
    ),
    "prompt with empty thoughts": (t.ASKS_NO_THOUGHTS, t.TWO, TWO),
    "channels": (
        t.CHANNELS, t.REASONED,
        ["<|channel|>final<|message|>Hello.<|end|>",
         "<|channel|>thoughts<|message|>because<|end|><|start|>assistant<|channel|>final"
         "<|message|>Sure.<|end|>"],
    ),
    "channels without thoughts": (
        t.CHANNELS, [t.ONE[0], t.ONE[1] | {"reasoning_content": ""}],
        ["<|channel|>final<|message|>Hello.<|end|>"],
    ),
    "marked": (t.MARKED, t.FIRST, FIRST),
    "marked with its header": (
        t.MARKED_HEADER, dialogue("Hi", "Hello.", "Hi", ""), ["Hello.<|end|>", "<|end|>"],
    ),
    "only the last is marked": (t.MARKED_LAST, t.TWO, TWO[1:]),
    "no end": (t.NO_END, t.TWO, ["Hello.", "Sure."]),
    "end between": (t.END_BETWEEN, t.TWO, [f"Hello.{EOS}", "Sure."]),
    "end of the last": (t.END_LAST, t.TWO, ["Hello.", f"Sure.{EOS}"]),
    "end of the chat": (t.END_TWICE, t.TWO, TWO),
    "different end of the last answer": (
        t.OTHER_END_LAST, [*t.TWO, say("assistant", "Yes.")], [*TWO, "Yes.<|return|>"],
    ),
    "different end of the last message": (
        t.OTHER_END_ALWAYS, t.TWO, ["Hello.<|end|>", "Sure.<|return|>"],
    ),
    "no generation prompt": (t.NEVER_ASKS, t.TWO, TWO),
    "no tags at all": (t.SPEAKERS, t.FIRST, [f" Hello!{EOS}", f" Hi.{EOS}"]),
    "no prompt": (t.SYSTEM_IN_LAST, t.TWO, [f" Hello.{EOS}", f" Sure.{EOS}"]),
    "parts": (t.PARTS, t.FIRST, FIRST),
    "private use": (t.PLAIN, dialogue("\U000f0001", PRIVATE), [f"{PRIVATE}<|end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_turn_is_learned_from_its_header_to_its_end(case: str, own: Any) -> None:
    template, messages, expected = CASES[case]
    assert learned(own, template, messages) == expected


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_an_answer_that_is_marked_as_unlearned_is_counted(own: Any, mark: dict[str, Any]) -> None:
    first, *others = t.TWO
    whole = rendered(own, t.PLAIN, t.TWO)
    found = rendered(own, t.PLAIN, [first, {**others[0], **mark}, *others[1:]])
    assert found.text == whole.text
    assert found.learned == whole.learned[1:]
    assert found.counts == {"masked_turns": 1}
    kept = [first, {**others[0], "weight": 1, "train": True, "loss": True}, *others[1:]]
    assert rendered(own, t.PLAIN, kept).learned == whole.learned


def test_remembered_surroundings_of_turns_give_the_same_result(own: Any) -> None:
    own.chat_template = t.THINKS
    chats = [t.TWO, t.THOUGHTS, t.FIRST, t.REASONED, t.ONE]
    alone = [ChatRenderer(own).render(document(chat)).learned for chat in chats]
    together = ChatRenderer(own)
    assert [together.render(document(chat)).learned for chat in chats * 2] == alone * 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (t.CALLS, '<call>{"name": "sky", "arguments": {"city": "Oslo"}}</call><|end|>'),
        (t.TEXT_CALLS, '<call>{"name": "sky", "arguments": {"city": "Oslo"}}</call><|end|>'),
        (t.BARE_CALLS, '<call>{"name": "sky", "arguments": {"city": "Oslo"}}</call><|end|>'),
        (t.ITEM_CALLS, "<call>sky<city>Oslo</call><|end|>"),
        (t.NONE_CALLS, '<call>{"name": "sky", "arguments": {"city": "Oslo"}}</call><|end|>'),
        (t.NAMES_TOOL_AGAIN, 'to sky {"city": "Oslo"}<|end|>'),
    ],
)
def test_a_tool_call_is_learned_with_its_arguments_as_json(
    template: str, expected: str, own: Any
) -> None:
    assert learned(own, template, t.TOOL) == [expected, "Cold.<|end|>"]
    # arguments may be JSON text already
    function = {"name": "sky", "arguments": json.dumps({"city": "Oslo"})}
    calls = [{"type": "function", "function": function}]
    texts = [t.TOOL[0], say("assistant", "", tool_calls=calls), *t.TOOL[2:]]
    assert learned(own, template, texts) == [expected, "Cold.<|end|>"]


def test_several_calls_beside_a_content_are_learned(own: Any) -> None:
    calls = [t.call("sky", city="Oslo", days=2), t.call("now")]
    messages = [t.TOOL[0], say("assistant", "Wait. ", tool_calls=calls), *t.TOOL[2:]]
    assert learned(own, t.CALLS, messages)[0] == (
        'Wait. <call>{"name": "sky", "arguments": {"city": "Oslo", "days": 2}}</call>'
        '<call>{"name": "now", "arguments": {}}</call><|end|>'
    )


@pytest.mark.parametrize("form", [None, [{"type": "text", "text": "Hi"}]])
def test_a_content_may_be_missing_or_in_parts(form: Any, own: Any) -> None:
    messages = [say("user", "Hi") | ({"content": form} if form else {}), *t.TOOL[1:]]
    messages[1] = messages[1] | {"content": None}
    assert "<|user|>\nHi<|end|>" in rendered(own, t.CALLS, messages).text


@pytest.mark.parametrize(
    ("template", "messages", "line"),
    [
        (t.PLAIN, t.TOOL, "unrendered_messages: the chat template does not write the tool call of "
         "message 2 (assistant)"),
        (t.CALLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
         t.TOOL, "unrendered_messages: the chat template does not write the content of message 3 "
         "(tool)"),
        (t.turns("{{ m.content[:4] }}<|end|>"), t.TWO, "unrendered_messages: the chat template "
         "does not write the content of message 2 (assistant) completely"),
        (t.SYSTEM_IN_LAST, t.WITH_SYSTEM, "unrendered_messages: the chat template does not write "
         "the content of message 1 (system)"),
        (t.ITEM_CALLS, [t.TOOL[0], say("assistant", "", tool_calls=[t.call("f", a={"b": "c"})])],
         "unrendered_messages: the chat template does not write the arguments of a tool call as "
         "JSON"),
        (t.turns("{{ m.content | upper }}<|end|>"), t.ONE, "unlocated_turns: the text "
         "that the chat template writes depends on the content of the messages"),
        (t.turns("{% if m.content %}: {{ m.content }}{% endif %}<|end|>"),
         [*t.ONE, say("user", "Hm"), say("assistant", "")],
         "unlocated_turns: message 4 (assistant) is empty"),
        (t.PLAIN, [say("user", [{"type": "image"}]), t.ONE[1]],  # type: ignore[arg-type]
         "unrenderable_chats: message 1 (user) has a content that is not all text"),
        ("{{ raise_exception('roles must\nalternate') }}", t.ONE,
         "unrenderable_chats: the chat template cannot render this chat: roles must; repair it"),
        ("{% if %}", t.ONE, "unrenderable_chats: the chat template cannot render this chat: "),
        ("{{ messages[7].content }}", t.ONE, "unrenderable_chats: the chat template cannot "),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_does_not_write_completely_is_a_bad_row(
    template: str, messages: Sequence[dict[str, Any]], line: str, own: Any
) -> None:
    kind, line = line.split(": ", 1)
    assert f"{kind}: c.jsonl:3: {line}" in refused(own, template, messages)


def test_a_turn_without_its_generation_prompt_is_a_bad_row(own: Any) -> None:
    template = t.PLAIN.replace(t.PLAIN[t.PLAIN.index("{% if add") :], "") + (
        "{% if add_generation_prompt %}(answer){% endif %}"
    )
    template = template.replace("<|end|>\n", "").replace("<|{{ m.role }}|>", "[{{ m.role }}]")
    assert "unlocated_turns: " in refused(own, template, t.ONE)


@pytest.mark.parametrize(
    ("template", "messages", "counts"),
    [
        (t.THINKS, t.THOUGHTS, {"dropped_thoughts": 1}),
        (t.CHANNELS, t.REASONED, {"dropped_thoughts": 1}),
        (t.PLAIN, t.REASONED, {"dropped_thoughts": 2}),
        (t.PLAIN, t.THOUGHTS, {}),
        (t.NO_END, t.TWO, {"unended_turns": 2}),
        (t.END_LAST, t.TWO, {"unended_turns": 1}),
        (t.DATED, t.TWO, {"dated_chats": 1}),
    ],
)
def test_omitted_thoughts_missing_ends_and_dates_are_counted(
    template: str, messages: Sequence[dict[str, Any]], counts: dict[str, int], own: Any
) -> None:
    found = rendered(own, template, messages)
    assert found.counts == counts
    assert found.text.startswith("01 Jan 2025\n") == (template is t.DATED)


def test_text_before_a_thought_belongs_to_the_answer(own: Any) -> None:
    before = [say("user", "Hi"), say("assistant", "First <think>greet</think>Hello.")]
    assert "unrendered_messages: " in refused(own, t.THINKS, before)
    opened = [*t.ONE[:1], say("assistant", "greet</think>Hello."), *t.ONE]
    assert rendered(own, t.THINKS, opened).counts == {"dropped_thoughts": 1}


@pytest.mark.parametrize(
    ("template", "counts"),
    [
        (t.TOOLS, {"unrendered_documents": 1}),
        (t.DOCUMENTS, {"unrendered_tools": 1}),
        (t.PLAIN, {"unrendered_tools": 1, "unrendered_documents": 1}),
    ],
)
def test_the_template_gets_tools_and_documents(
    template: str, counts: dict[str, int], own: Any
) -> None:
    tool = {"type": "function", "function": {"name": "sky", "description": "above"}}
    beside = {"tools": (tool,), "documents": ({"title": "one", "text": "paper"},)}
    found = rendered(own, template, t.ONE, **beside)
    assert found.counts == counts
    assert ('<tool>{"type": "function"' in found.text) is (template is t.TOOLS)
    assert ("<doc>paper" in found.text) is (template is t.DOCUMENTS)
    assert [found.text[b:e] for b, e in found.learned] == ["Hello.<|end|>"]
    asked = ChatRenderer(own).ask(document(t.ONE, **beside))
    assert asked.text == found.text[: -len("Hello.<|end|>\n")]
    assert asked.counts == counts


def test_a_developer_is_the_system_unless_the_template_has_the_role(own: Any) -> None:
    messages = [say("developer", "Be brief."), *t.ONE]
    assert rendered(own, t.PLAIN, messages).text.startswith("<|system|>\nBe brief.")
    knowing = "{# system or developer #}" + t.PLAIN
    assert rendered(own, knowing, messages).text.startswith("<|developer|>\nBe brief.")


def test_a_tokenizer_may_have_a_template_for_tools(own: Any) -> None:
    own.chat_template = {"default": t.PLAIN, "tool_use": t.TOOLS}
    with pytest.raises(BadRowError, match="does not write the tool call"):
        ChatRenderer(own).render(document(t.TOOL))
    tool = {"type": "function", "function": {"name": "sky"}}
    found = ChatRenderer(own).render(document(t.TOOL, tools=(tool,)))
    assert found.text.startswith('<tool>{"type": "function"')
    own.chat_template = {"other": t.PLAIN}
    with pytest.raises(ColdstillError, match=r"^the tokenizer's chat_template: trans"):
        ChatRenderer(own).render(document(t.ONE))


def test_a_prompt_must_be_complete_too(own: Any) -> None:
    own.chat_template = t.THINKS
    asked = ChatRenderer(own).ask(document(t.THOUGHTS))
    assert asked.text.endswith("Hello.<|end|>\n<|user|>\nMore<|end|>\n<|assistant|>\n")
    assert asked.counts == {"dropped_thoughts": 1}
    with pytest.raises(BadRowError, match=r"tool call of message 2 \(assistant\)"):
        ChatRenderer(own).ask(document(t.TOOL))
