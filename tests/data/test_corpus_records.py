"""Records of data sets become documents."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from dataclasses import replace
from typing import Any

import pydantic
import pytest
import refusals
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.document import Document, is_held_out
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.records import Reading, to_document, used_columns
from coldstill.data.errors import ColdstillError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
QUESTIONS = ("prompt", "question", "instruction")
SKIP = ', or skip such rows with corpus.bad_rows = "skip"'


def read(record: Any, **columns: Any) -> Document:
    return to_document("a.jsonl:7", record, Columns(**columns))


def refusal(record: Any, **columns: Any) -> str:
    return refusals.refusal(read, record, **columns)


@pytest.mark.parametrize(
    ("record", "prompt", "text"),
    [
        ({"text": "t", "id": 4}, "", "t"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": "i", "response": "r"}, "i", "r"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "output": "o", "input": "n"}, "i\n\nn", "o"),
        ({"instruction": "i", "output": "o", "input": ""}, "i", "o"),
        ({"instruction": "i", "output": "o", "input": None}, "i", "o"),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"prompt": None, "completion": "c"}, "", "c"),
        ({"prompt": " a\r\n", "completion": "\tb \u2028\x00"}, " a\r\n", "\tb \u2028\x00"),
        ({"messages": None, "prompt": None, "completion": None, "text": "t"}, "", "t"),
        *(({name: "p", "chosen": "c", "rejected": "r"}, "p", "c") for name in QUESTIONS),
    ],
)
def test_an_unmapped_record_is_recognised_by_its_columns(
    record: dict[str, Any], prompt: str, text: str
) -> None:
    assert read(record) == Document(where="a.jsonl:7", prompt=prompt, text=text)


def test_the_first_match_wins() -> None:
    by_rank: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "user", "content": "m"}]}, "m"),
        ({"conversations": [{"role": "user", "content": "v"}]}, "v"),
        ({"prompt": "p", "completion": "c"}, "c"),
        ({"instruction": "i", "response": "r"}, "r"),
        ({"instruction": "i", "output": "o"}, "o"),
        ({"question": "q", "answer": "a"}, "a"),
        ({"text": "t"}, "t"),
    ]
    record: dict[str, Any] = {}
    for columns, expected in reversed(by_rank):
        record |= columns
        document = read(record)
        assert (document.text or document.messages[0]["content"]) == expected


def test_a_record_without_text_is_an_empty_document() -> None:
    records: list[dict[str, Any]] = [
        *({"text": text} for text in ("", None)),
        {"messages": []},
        {"messages": None},
        {"question": "q", "answer": None},
        {"prompt": "p", "completion": ""},
    ]
    assert all(read(record).is_empty for record in records)


def test_only_mapped_columns_and_keys_are_used() -> None:
    record = {"messages": [USER], "text": "t", "body": "b", "q": "ask", "a": "say"}
    assert read(record, text="body") == Document(where="a.jsonl:7", text="b")
    assert read(record, prompt="q", completion="a").prompt == "ask"
    assert read({"chat": [USER], "text": "t"}, messages="chat").messages == (USER,)
    record = {"instruction": "i", "input": "n", "output": "o"}
    assert read(record, prompt="instruction", completion="output").prompt == "i"
    chat = {"messages": [{"speaker": "human", "words": "hi", "at": 1}]}
    assert read(chat, role="speaker", content="words").messages == (USER | {"at": 1},)
    assert "no 'speaker' (have: from, value)" in refusal(
        {"messages": [{"from": "human", "value": "hi"}]}, role="speaker"
    )


def test_messages_keep_their_other_keys_unless_null() -> None:
    message = USER | {"name": "f", "reasoning_content": "hm", "meta": {"a": [1, None]}}
    assert read({"messages": [message]}).messages == (message,)
    each = [json.dumps(USER), json.dumps(ASSISTANT)]
    assert read({"messages": each}).messages == (USER, ASSISTANT)
    assert read({"messages": json.dumps([USER])}).messages == (USER,)
    assert read({"messages": [{"from": "human", "value": "hi"}]}).messages == (USER,)
    assert read({"prompt": [USER], "completion": [ASSISTANT]}).messages == (USER, ASSISTANT)
    from_table = read({"messages": [USER | {"name": None, "tool_calls": None}]})
    assert from_table.digest() == read({"messages": [USER]}).digest()
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    without = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    for empty in (call, without):
        assert read({"messages": [empty]}).messages[0]["content"] == ""


def test_values_in_a_message_become_json_values() -> None:
    when = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    meta = {"b": decimal.Decimal("1.50"), "at": [when], "score": 2.0, 3: b"x", "none": None}
    document = read({"messages": [USER | {"meta": meta}]})
    assert json.dumps(document.messages[0]["meta"]) == json.dumps(
        {"3": "x", "at": ["2024-05-01 00:00:00+00:00"], "b": 1.5, "score": 2}
    )
    assert len(document.digest()) == 32


def test_a_missing_column_is_reported_with_those_that_exist() -> None:
    assert refusal({"id": 1, "body": "b"}) == (
        "a.jsonl:7: missing column 'text' (have: id, body); map it in the recipe: "
        f'[corpus.columns] text = "..."{SKIP}'
    )
    assert refusal({}).startswith("a.jsonl:7: missing column 'text' (have: none);")
    assert "missing column 'x' (have: p)" in refusal({"p": ""}, prompt="p", completion="x")
    unmapped: list[tuple[Any, dict[str, Any], str]] = [
        ({"text": "t"}, {"text": "body"}, "text"),
        ({"p": ""}, {"prompt": "p", "completion": "x"}, "completion"),
        ({"x": ""}, {"prompt": "p", "completion": "x"}, "prompt"),
        ({"x": ""}, {"messages": "p"}, "messages"),
    ]
    for record, mapped, name in unmapped:
        assert refusal(record, **mapped).endswith(f'{name} = "..."{SKIP}')
    for half in ("prompt", "instruction", "answer"):  # of a pair
        assert "missing column 'text'" in refusal({half: "x"})


DEEP = json.loads("[" * 150 + "]" * 150)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a.jsonl:7: list [1] is not a record, expected an object"),
        ("text", "a.jsonl:7: str 'text' is not a record"),
        (None, "a.jsonl:7: NoneType None is not a record"),
        ({"text": 42}, "a.jsonl:7: column 'text' holds int 42, expected a string"),
        ({"text": ["a"]}, "column 'text' holds list ['a'], expected a string"),
        ({"text": list(range(99))}, "7, 8, 9, 10, 11..., expected a string"),
        ({"prompt": "p", "completion": 1}, "column 'completion' holds int 1"),
        ({"prompt": [USER], "completion": "c"}, "column 'prompt' holds list"),
        ({"instruction": "i", "output": "o", "input": 3}, "column 'input' holds int 3"),
        ({"messages": "hi"}, "column 'messages' holds str 'hi', expected a list of messages"),
        ({"messages": USER}, "column 'messages' holds dict"),
        ({"messages": ["hi"]}, "a.jsonl:7: messages[0]: str 'hi' is not a message"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1]: no 'content' (have: role); map it"),
        ({"messages": [{"content": "c"}]}, "messages[0]: no 'role' (have: content); map it"),
        ({"messages": [{"from": "human"}]}, "messages[0]: no 'content' (have: from)"),
        ({"messages": [{}]}, "messages[0]: no 'role' (have: none)"),
        ({"messages": [{"role": 1, "content": "c"}]}, "messages[0]: column 'role' holds int 1"),
        ({"messages": [{"role": "user", "content": [1]}]}, "column 'content' holds list [1]"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "column 'value' holds int 1"),
        ({"text": "ab\ud83d"}, "a.jsonl:7: column 'text' has half a surrogate pair at character 2"),
        ({"\ud83d\n": 1}, "missing column 'text' (have: '\\ud83d\\n'); map it"),
        ({"messages": [USER | {"a\ud83d": 1}]}, "messages[0]: a value has half a surrogate"),
        ({"messages": [USER | {"a": {"b": ["\ud83d"]}}]}, "messages[0]: a value has half"),
        ({"messages": [USER | {"a": float("nan")}]}, "messages[0]: holds float nan, which is no"),
        ({"messages": [USER | {"a": b"\xff"}]}, "holds bytes b'\\xff', which is not text"),
        ({"messages": [USER | {"a": DEEP}]}, "messages[0]: is nested deeper than 100 levels"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "a part of type 'image', only"),
    ],
)
def test_a_wrong_value_is_reported_with_its_place(record: Any, message: str) -> None:
    assert message in refusal(record)


def test_a_contradictory_mapping_is_refused_when_it_is_made() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"completion": "c"}, "prompt is not mapped"),
        ({"text": "t", "messages": "m"}, "text and messages are both mapped"),
        (
            {"prompt": "p", "completion": "c", "messages": "m"},
            "prompt and messages are both mapped",
        ),
    ]
    for mapped, message in cases:
        with pytest.raises(ColdstillError, match=rf"^corpus\.columns: .*{message}"):
            Columns(**mapped)
    model = pydantic.TypeAdapter(Columns)
    assert model.validate_python({"text": "body"}) == Columns(text="body")
    with pytest.raises(pydantic.ValidationError, match="txet"):
        model.validate_python({"txet": "body"})


def test_a_mapped_prompt_needs_a_completion_unless_it_is_to_be_answered() -> None:
    columns = Columns(prompt="q")
    with pytest.raises(ColdstillError, match=r"^corpus\.columns: completion is not .*generate"):
        columns.expect_answers()
    with pytest.raises(ColdstillError, match=r"^corpus\.columns: completion is not mapped"):
        next(read_documents([], columns))
    columns.for_prompts().expect_answers()
    Columns(prompt="q", completion="a").expect_answers()
    Columns().expect_answers()


def test_only_used_columns_are_read_from_a_table() -> None:
    names = ["id", "text", "image", "messages", "input", "body"]
    assert used_columns("t", names, Columns()) == ["text", "messages", "input"]
    assert used_columns("t", names, Columns(text="body")) == ["body"]
    assert used_columns("t", names, Columns(prompt="id", completion="id")) == ["id"]
    with pytest.raises(ColdstillError, match=r"^t: missing column 'text' \(have: id\)"):
        used_columns("t", ["id"], Columns())


def prompt(record: Any, **columns: Any) -> Document:
    return to_document("a.jsonl:7", record, Columns(**columns).for_prompts())


@pytest.mark.parametrize(
    ("record", "question", "text"),
    [
        ({"prompt": "p"}, "p", ""),
        ({"prompt": "p", "completion": None}, "p", ""),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": "i", "input": "n"}, "i\n\nn", ""),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\n\nn", "o"),
        ({"question": "q", "id": 3}, "q", ""),
        ({"prompt": "p", "text": "t"}, "p", ""),
        ({"prompt": "p", "question": "q", "answer": "a"}, "q", "a"),
        ({"text": "t"}, "", "t"),
        ({"prompt": "", "completion": "c"}, "", ""),
        ({"prompt": None, "completion": "c"}, "", ""),
    ],
)
def test_a_corpus_of_prompts_is_recognised_without_completions(
    record: dict[str, Any], question: str, text: str
) -> None:
    assert prompt(record) == Document(where="a.jsonl:7", prompt=question, text=text)


def test_prompts_need_no_completion() -> None:
    assert prompt({"q": "ask"}, prompt="q").prompt == "ask"
    assert prompt({"q": "ask"}, prompt="q", completion="a").prompt == "ask"
    both = prompt({"q": "ask", "a": "say"}, prompt="q", completion="a")
    assert (both.prompt, both.text) == ("ask", "say")
    assert prompt({"c": [USER], "text": "t"}, messages="c").messages == (USER,)
    assert prompt({"body": "b"}, text="body").text == "b"
    assert prompt({"prompt": [USER]}).messages == (USER,)
    assert prompt({"prompt": [USER], "completion": None}).messages == (USER,)
    assert prompt({"prompt": [USER], "completion": [ASSISTANT]}).messages == (USER, ASSISTANT)
    mapped = Columns(prompt="q", completion="a").for_prompts()
    assert used_columns("t", ["id", "q"], mapped) == ["q"]
    assert used_columns("t", ["a", "id", "q"], mapped) == ["q", "a"]
    names = ["id", "prompt", "input", "completion"]
    assert used_columns("t", names, Columns().for_prompts()) == ["prompt", "input", "completion"]


def test_a_record_without_a_prompt_is_refused() -> None:
    for record, message in (
        ({"answer": "a"}, "missing column 'prompt' (have: answer); map it in the recipe: "),
        ({"prompt": 3}, "column 'prompt' holds int 3, expected a string"),
        ({"prompt": [USER], "completion": "c"}, "column 'prompt' holds list"),
    ):
        assert message in refusals.refusal(prompt, record)
    message = refusals.refusal(prompt, {"p": "x"}, prompt="q", completion="p")
    assert re.search(r'missing column .q.*columns\] prompt = "\.\.\.", or', message)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [ASSISTANT]},
        {"prompt": "hi", "chosen": [ASSISTANT]},
        {"prompt": "hi", "chosen": [USER, ASSISTANT]},
        {"prompt": [USER], "chosen": "hello"},
        {"chosen": [USER, ASSISTANT]},
        {"chosen": json.dumps([USER, ASSISTANT])},
        {"conversations": [USER], "chosen": {"from": "gpt", "value": "hello"}},
        {"messages": [USER], "chosen": "hello"},
        {"prompt": "hi", "chosen": ASSISTANT},
        {"messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT]},
    ],
)
def test_the_better_answer_of_a_preference_is_learned(record: dict[str, Any]) -> None:
    reading = Reading()
    worse = record | {"rejected": "no"}
    document = to_document("a.jsonl:7", worse, Columns(), reading)
    assert document.messages == (USER, ASSISTANT)
    assert "rejected" in str(reading.note())


def test_an_answer_that_is_json_by_itself_is_a_text() -> None:
    for answer in ("[1, 2]", "[]", '{"a": 1}', '[{"a": 1}]'):
        document = read({"prompt": "[0]", "chosen": answer, "rejected": "r"})
        assert (document.prompt, document.text) == ("[0]", answer)
        chat = read({"prompt": [USER], "chosen": answer, "rejected": "r"})
        assert chat.messages == (USER, {"role": "assistant", "content": answer})
    message = refusal({"chosen": "Human: a Assistant: b", "rejected": "c"})
    assert 'columns] prompt = "...", completion = "chosen", or learn all of the text: ' in message


def test_an_answer_whose_label_is_false_is_refused() -> None:
    pair = {"prompt": "Hi", "completion": "Go away."}
    assert refusal({**pair, "label": False}).startswith(
        "a.jsonl:7: column 'label' is false, so its completion is not wanted"
    )
    reading = Reading()
    wanted = to_document("c.jsonl:1", {**pair, "label": True}, Columns(), reading)
    assert (wanted.prompt, wanted.text, reading.note()) == ("Hi", "Go away.", None)
    to_document("c.jsonl:1", {**pair, "label": 0}, Columns(), reading)
    assert reading.note() == "columns not used: label (in 1 of 2 rows)"
    mapped = Columns(prompt="prompt", completion="completion")
    assert to_document("c.jsonl:1", {**pair, "label": False}, mapped).text == "Go away."
    asked = to_document("c.jsonl:1", {**pair, "label": False}, Columns().for_prompts())
    assert asked.prompt == "Hi"


def test_system_tools_and_documents_of_a_row_belong_to_its_chat() -> None:
    tool = {"name": "f", "parameters": {"type": "object"}}
    kept = {"type": "function", "function": tool}
    chat = {"messages": [USER, ASSISTANT], "system": "be brief"}
    for tools in ([tool], [kept], json.dumps([tool]), [json.dumps(kept)], tool):
        for name in ("tools", "functions"):
            document = read(chat | {name: tools, "documents": ["one", {"title": "two"}]})
            assert document.messages == (
                {"role": "system", "content": "be brief"}, USER, ASSISTANT
            )  # fmt: skip
            assert document.tools == (kept,)
            assert document.documents == ({"text": "one"}, {"title": "two"})
    empties: list[Any] = ["", None, [], "[]", "null"]
    for empty in empties:
        assert read(chat | {"tools": empty}).tools == ()
    mapped = read(chat | {"t": [tool], "s": "S"}, tools="t", system="s")
    assert mapped.tools == (kept,)
    assert mapped.messages[0]["content"] == "S"
    assert read(chat, system="").messages == (USER, ASSISTANT)
    assert "column 'tools': int 3 is not a tool" in refusal(chat | {"tools": [3]})


def test_a_system_text_before_a_prompt_is_read_with_it() -> None:
    for name in ("system", "system_prompt"):
        document = read({name: "s", "question": "q", "answer": "a"})
        assert (document.prompt, document.system) == ("s\n\nq", "s")
    row = {"system": "s", "q": "ask", "a": "say"}
    assert read(row, prompt="q", completion="a").prompt == "ask"


def test_unused_columns_are_counted() -> None:
    reading = Reading()
    system = {"role": "system", "content": "own"}
    rows: list[dict[str, Any]] = [
        {"id": 1, "messages": [USER, ASSISTANT], "system": "used", "score": None},
        {"id": 2, "messages": [system, USER, ASSISTANT], "system": "not used", "score": 3},
        {"id": 3, "messages": [system, USER, ASSISTANT], "system": "own", "tools": []},
        {"id": 4, "instruction": "i", "input": "", "output": "o"},
    ]
    for row in rows:
        to_document("a", row, Columns(), reading)
    assert reading.note() == (
        "columns not used: id, score (in 1 of 4 rows), system (in 1 of 4 rows)"
    )
    assert Reading().note() is None


CHAT = ({"role": "user", "content": "hi"},)


def test_the_digest_depends_on_every_part_of_the_content() -> None:
    plain = Document(where="a:1", text="one", prompt="two", messages=CHAT)
    changed = [
        replace(plain, text="One"),
        replace(plain, prompt="Two"),
        replace(plain, messages=({"role": "user", "content": "ho"},)),
        replace(plain, messages=({"role": "system", "content": "hi"},)),
        replace(plain, messages=CHAT * 2),
        replace(plain, tools=({"name": "f"},)),
        replace(plain, documents=({"name": "f"},)),
        replace(plain, text="two", prompt="one"),
    ]
    assert len({document.digest() for document in [plain, *changed]}) == 9


def test_the_digest_does_not_depend_on_the_source_or_the_order_of_keys() -> None:
    document = Document(where="a:1", text="one", prompt="two", messages=CHAT)
    turned = replace(document, where="b:9", messages=({"content": "hi", "role": "user"},))
    assert document.digest() == turned.digest()
    # without tools, it is that of earlier versions
    earlier = "0b816d39fb10db091e42a4dda4148a98a576697879257825425ad6bffc19f89a"
    assert document.digest().hex() == earlier


def test_adding_documents_does_not_move_others_to_another_split() -> None:
    def held_out(texts: list[str]) -> set[str]:
        return {t for t in texts if is_held_out(Document(where="", text=t).digest(), 0.2)}

    some = [f"text {i}" for i in range(500)]
    more = [f"another {i}" for i in range(500)]
    assert held_out(some)
    assert held_out(more + some[::-1]) & set(some) == held_out(some)


def test_a_share_of_documents_is_held_out_and_a_larger_share_only_adds_to_it() -> None:
    digests = [Document(where="", text=str(i)).digest() for i in range(20_000)]
    held = [{d for d in digests if is_held_out(d, share)} for share in (0.02, 0.5)]
    assert held[0] < held[1]
    for found, share, spread in zip(held, (0.02, 0.5), (0.004, 0.014), strict=True):
        assert abs(len(found) / len(digests) - share) < spread  # four standard deviations
    for digest in (bytes(32), b"\xff" * 32):
        assert not is_held_out(digest, 0.0)
        assert is_held_out(digest, 1.0)


def test_the_size_counts_all_text() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "é"}]
    messages: tuple[dict[str, Any], ...] = (
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
    )
    document = Document(where="", messages=messages, tools=({"name": "f"},))
    calls = len(json.dumps([call], ensure_ascii=False).encode())
    assert document.size == 4 + calls + 2 + len('{"name": "f"}')


def test_a_prompt_can_become_a_chat() -> None:
    pair = Document(where="a:1", prompt="s\n\nq", system="s", text="a")
    assert pair.as_chat() == Document(
        where="a:1",
        messages=(
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ),
    )
    assert [m["role"] for m in Document(where="", prompt="q").as_chat().messages] == ["user"]
