from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from coldstill.data.corpus.document import Document, is_held_out

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
    document = Document(where="a:1", text="one")
    assert document.digest() == replace(document, where="b:9").digest()
    turned = ({"content": "hi", "role": "user"},)
    assert (
        Document(where="", messages=CHAT).digest() == Document(where="", messages=turned).digest()
    )


def test_a_prompt_alone_is_an_empty_document() -> None:
    assert Document(where="", prompt="why?").is_empty
    assert not Document(where="", text="because").is_empty
    assert not Document(where="", messages=CHAT).is_empty


def test_adding_documents_does_not_move_others_to_another_split() -> None:
    def held_out(texts: list[str]) -> set[str]:
        return {t for t in texts if is_held_out(Document(where="", text=t).digest(), 0.2)}

    some = [f"text {i}" for i in range(500)]
    more = [f"another {i}" for i in range(500)]
    assert held_out(some)
    assert held_out(more + some[::-1]) & set(some) == held_out(some)


def test_about_the_requested_share_is_held_out() -> None:
    digests = [Document(where="", text=str(i)).digest() for i in range(20_000)]
    for share, spread in ((0.02, 0.004), (0.5, 0.014)):  # four standard deviations
        held = sum(is_held_out(digest, share) for digest in digests) / len(digests)
        assert abs(held - share) < spread


def test_a_larger_share_only_adds_held_out_documents() -> None:
    digests = [Document(where="", text=str(i)).digest() for i in range(2_000)]
    small = {digest for digest in digests if is_held_out(digest, 0.1)}
    large = {digest for digest in digests if is_held_out(digest, 0.3)}
    assert small < large
    for digest in (bytes(32), b"\xff" * 32):
        assert not is_held_out(digest, 0.0)
        assert is_held_out(digest, 1.0)


def test_a_document_without_tools_keeps_the_digest_of_earlier_versions() -> None:
    document = Document(where="a:1", text="one", prompt="two", messages=CHAT)
    assert document.digest().hex() == (
        "0b816d39fb10db091e42a4dda4148a98a576697879257825425ad6bffc19f89a"
    )


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
