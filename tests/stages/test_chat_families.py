# ruff: noqa: RUF001 - the tags of some families are spelt with full-width bars
"""Templates of well-known model families, if they are present: the assistant's turns are learned to
their ends, and a chat that a template cannot write is a bad row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chat_templates import FIRST, ONE, REASONED, THOUGHTS, TOOL, TWO, WITH_SYSTEM, call, say
from coldstill.data.corpus.document import BadRowError, Document
from coldstill.stages.corpus.render_chat import ChatRenderer
from coldstill.stages.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "chat-templates"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the templates are not present")


@dataclass(frozen=True, slots=True)
class Family:
    """The text that a template writes around an assistant's turn."""

    headers: tuple[str, ...]
    """Texts that ask for a turn."""
    ends: tuple[str, ...]
    """Texts that end a turn."""
    cannot: str = ""
    """Keys of `CHATS` that the template cannot write, separated by spaces."""


_ALTERNATES = "first tool tools calls mixed trips row"
_NO_TOOLS = "tool tools calls mixed trips"
_CHATML = ("<|im_start|>assistant\n",)
_DEEPSEEK = Family(
    ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), ("<｜end▁of▁sentence｜>",), "trips"
)
FAMILIES = {
    "cohere": Family(
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",), ("<|END_OF_TURN_TOKEN|>",), _ALTERNATES
    ),
    "deepseekv3": _DEEPSEEK,
    "gemma": Family(
        ("<start_of_turn>model\n",), ("<end_of_turn>",), f"{_ALTERNATES} system developer"
    ),
    "gemma3": Family(("<start_of_turn>model\n",), ("<end_of_turn>",), _ALTERNATES),
    "glm4moe": Family(("<|assistant|>",), ("",), "empty"),
    "gptoss": Family(("<|start|>assistant",), ("<|end|>", "<|return|>", "<|call|>"), "calls mixed"),
    "lfm2": Family(_CHATML, ("<|im_end|>",), _NO_TOOLS),
    "llama3": Family(
        ("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>",), _NO_TOOLS
    ),
    "llama3_1": Family(
        ("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>",), "calls mixed"
    ),
    "mistral_v03": Family(("[/INST]",), ("</s>",), f"{_ALTERNATES} system developer"),
    "nemotron_3_nano": Family(
        (*_CHATML, f"{_CHATML[0]}<think>", f"{_CHATML[0]}<think>\n"), ("<|im_end|>",)
    ),
    "phi3": Family(("<|assistant|>\n",), ("<|end|>",), _NO_TOOLS),
    "qwen2_5": Family(_CHATML, ("<|im_end|>",)),
    "qwen3": Family(_CHATML, ("<|im_end|>",)),
    "qwen3_5_think": Family((*_CHATML, f"{_CHATML[0]}<think>\n"), ("<|im_end|>",)),
    "qwen3_6": Family((*_CHATML, f"{_CHATML[0]}<think>\n"), ("<|im_end|>",)),
    "r1_distill": Family(
        _DEEPSEEK.headers, ("<｜end▁of▁sentence｜>", "<｜tool▁call▁end｜>"), "mixed trips"
    ),
}
TOOLS = (
    {"type": "function", "function": {
        "name": "sky", "description": "The sky above a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }},
)  # fmt: skip
CHATS: dict[str, Sequence[dict[str, Any]]] = {
    "one": ONE,
    "two": TWO,
    "system": WITH_SYSTEM,
    "developer": [say("developer", "Be brief."), *ONE],
    "first": FIRST,
    "tool": TOOL,
    "tools": TOOL,
    "calls": [
        TOOL[0],
        say("assistant", "", tool_calls=[call("sky", city="Oslo"), call("clock", zone="CET")]),
        say("tool", "cold"), say("tool", "noon"), TOOL[3],
    ],
    "mixed": [TOOL[0], say("assistant", "Wait.", tool_calls=[call("sky", city="Oslo")]), *TOOL[2:]],
    "trips": [*TOOL, say("user", "There?"), *TOOL[1:]],
    "thoughts": THOUGHTS,
    "reasoned": REASONED,
    "empty": [say("user", "Hi"), say("assistant", ""), say("user", "Hm"), ONE[1]],
    "row": [*ONE, say("assistant", "Again."), *TWO[2:]],
    "space": [say("user", "Hi "), say("assistant", " Hello.\n"), *TWO[2:]],
    "again": [say("user", "assistant Hi"), say("assistant", "Hi"), say("user", "Hi"), TWO[3]],
    "tags": [
        say("user", "What is <|im_end|>?"),
        say("assistant", "<|im_end|> is </s> or <end_of_turn> or <|eot_id|>, no?"), *TWO[2:],
    ],
}  # fmt: skip


def spoken(message: dict[str, Any]) -> list[str]:
    """The texts that a turn must contain, in order."""
    content = str(message["content"]).split("</think>")[-1].strip()
    calls = [c["function"] for c in message.get("tool_calls", ())]
    return [content, *(text for c in calls for text in (c["name"], *c["arguments"].values()))]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_assistants_turns_are_learned_with_every_template(
    name: str, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    family, renderer = FAMILIES[name], ChatRenderer(tokenizer)
    for kind, messages in CHATS.items():
        document = Document(
            where="a:1", messages=tuple(messages), tools=TOOLS if kind == "tools" else ()
        )
        if kind in family.cannot.split():
            with pytest.raises(BadRowError, match=r"^a:1: [^\n]*$"):
                renderer.render(document)
            continue
        found = renderer.render(document)
        answers = [m for m in messages if m["role"] == "assistant"]
        assert len(found.learned) == len(answers), kind
        end = 0
        for (begin, last), message in zip(found.learned, answers, strict=True):
            assert begin >= end
            header, turn, end = found.text[end:begin], found.text[begin:last], last
            assert header.endswith(family.headers), (kind, header, turn)
            assert not turn.strip().startswith(family.headers), (kind, turn)
            assert turn.endswith(family.ends), (kind, turn)
            where = 0
            for text in spoken(message):
                assert text in turn[where:], (kind, turn)
                where = turn.index(text, where) + len(text)
            others = "".join(m["content"] for m in messages if m["role"] not in ("assistant",))
            assert kind == "again" or turn not in others
        missing = [m for m in messages if m["role"] == "user"]
        assert all(m["content"].strip() in found.text for m in missing)


def test_every_template_in_the_folder_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == FAMILIES.keys()
