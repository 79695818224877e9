"""The prompt that the teacher is to answer, without the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chats import CHAT, END, TEMPLATE
from coldstill.data.corpus.document import BadRowError, Document
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.tokenize_documents import PromptTokenizer
from coldstill.stages.models.loading import load_tokenizer
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def own(tokenizer_folder: Path) -> Any:
    """A tokenizer that a test may change."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenizer_of(own: Any, length: int = 1024) -> PromptTokenizer:
    return PromptTokenizer(own, CorpusConfig(files=("a",), sequence_length=length))


def asked(own: Any, document: Document) -> str:
    ((_, found),) = tokenizer_of(own)([document], 5)
    assert found.index == 5
    assert found.tokens_T.dtype == np.int32
    assert found.learned_T.shape == found.tokens_T.shape
    assert not found.learned_T.any()
    return str(own.decode(found.tokens_T))


@pytest.mark.parametrize("text", ["", "and a completion"])
def test_a_prompt_is_kept_without_its_completion(text: str, own: Any) -> None:
    document = Document(where="a", prompt="every student ✓", text=text)
    assert asked(own, document) == "every student ✓"
    own.eos_token = None  # a prompt needs no separator
    assert tokenizer_of(own).separator == ()
    assert asked(own, document) == "every student ✓"


@pytest.mark.parametrize(
    ("turns", "last"), [((0, 5), 3), ((0, 4), 3), ((1, 3), 1), ((0, 2), 1), ((0, 1), 0)]
)
def test_a_chat_is_kept_up_to_its_last_turn_that_is_not_the_assistants(
    turns: tuple[int, int], last: int, own: Any
) -> None:
    messages = CHAT[turns[0] : turns[1]]
    before = "".join(f"<{m['role']}>{m['content']}{END}" for m in CHAT[turns[0] : last + 1])
    assert asked(own, Document(where="a", messages=messages)) == f"{before}<assistant>"
    tool = (*CHAT[1:3], {"role": "tool", "content": "42"}, CHAT[4])
    assert asked(own, Document(where="a", messages=tool)).endswith(f"<tool>42{END}<assistant>")


def test_a_prompt_keeps_its_own_end_but_not_that_of_the_tokenizer(own: Any) -> None:
    assert asked(own, Document(where="a", prompt=f"to learn{END}")) == f"to learn{END}"
    begin = own.convert_ids_to_tokens(5)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {END}", special_tokens=[(begin, 5), (END, own.eos_token_id)]
    )
    ((_, found),) = tokenizer_of(own)([Document(where="a", prompt="to learn")], 0)
    assert found.tokens_T[0] == 5
    assert own.decode(found.tokens_T[1:]) == "to learn"


def test_a_text_and_an_empty_prompt_are_refused(own: Any) -> None:
    with pytest.raises(ColdstillError, match=r"^a: a text, but teacher\.generate needs") as error:
        tokenizer_of(own)([Document(where="a", text="to learn")], 0)
    assert not isinstance(error.value, BadRowError)
    own.backend_tokenizer.normalizer = Strip()
    with pytest.raises(BadRowError, match=r"^a: its prompt has no tokens") as error:
        tokenizer_of(own)([Document(where="a", prompt="  ")], 0)
    assert error.value.kind == "empty_prompts"


def test_every_bad_prompt_is_reported(own: Any) -> None:
    own.chat_template = "{{ raise_exception('no tools') if messages[0].role == 'tool' }}" + TEMPLATE
    documents = [
        Document(where="a:1", prompt="as"),
        Document(where="a:2", prompt="x" * 40),
        Document(where="a:3", messages=({"role": "tool", "content": "3"},)),
        Document(where="a:4", messages=(CHAT[2],)),
        Document(where="a:5", prompt="x" * 12),
        Document(where="a:6", prompt="x" * 11),
    ]
    skipped: list[BadRowError] = []
    tokenizer = tokenizer_of(own, 12)
    found = tokenizer(documents, 0, skipped.append)
    assert [(document.where, one.index) for document, one in found] == [("a:1", 0), ("a:6", 1)]
    assert len(found[1][1].tokens_T) == 11  # one position is left for the answer
    assert {str(bad)[:3]: bad.kind for bad in skipped} == {
        "a:2": "too_long_prompts",
        "a:3": "unrenderable_chats",
        "a:4": "unrenderable_chats",
        "a:5": "too_long_prompts",
    }
    lines = {str(bad)[:3]: str(bad) for bad in skipped}
    assert "its prompt of 12 tokens leaves no room for an answer in sequences of 12" in lines["a:5"]
    assert "it has only messages of the assistant" in lines["a:4"]
    for one in documents[1:5]:
        with pytest.raises(BadRowError, match=rf"^{one.where}: "):
            tokenizer([one], 0)


def test_a_prompt_becomes_a_chat_if_configured(own: Any) -> None:
    config = CorpusConfig(files=("a",), as_chat=True)
    documents = [
        Document(where="a", prompt="every student", text="listens"),
        Document(where="b", prompt="every student"),
    ]
    for _, found in PromptTokenizer(own, config)(documents, 0):
        assert own.decode(found.tokens_T) == f"<user>every student{END}<assistant>"
    plain = tokenizer_of(own)
    plain(documents, 0)
    assert plain.counts == {"untemplated_pairs": 2}
