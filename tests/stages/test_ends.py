"""Which tokens end a text: measured where documents, answers and turns end."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.stages.capture.generate import end_tokens
from coldstill.stages.export.gguf.tokens import end_slots
from coldstill.stages.models.ends import Ends, measured_ends, own_ends, stop_at, with_end
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences

EOS = 0
BREAK = 10 + 40
"""An ordinary token, as a line break is."""


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    """A tokenizer with tokens for the ends of turns and of thoughts."""
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|turn_end|>", "<|part_end|>"]})
    return chatty


TURN, PART = VOCABULARY, VOCABULARY + 1


def packed(*documents: tuple[list[int], list[int]]) -> list[Sequences]:
    """Documents in one sequence: their tokens, and 1 where these are learned."""
    pieces = [
        TokenizedDocument(i, np.array(tokens, np.int32), np.array(learned, np.bool_))
        for i, (tokens, learned) in enumerate(documents)
    ]
    return [build_sequences(0, [pieces])]


def text(*tokens: int) -> tuple[list[int], list[int]]:
    """A plain document."""
    return list(tokens), [1] * len(tokens)


def test_documents_end_with_their_separator(tokenizer: Any) -> None:
    found = measured_ends(packed(text(7, 8, EOS), text(9, 7, 5, EOS)), tokenizer, (EOS,))
    assert found == Ends(tokens=(EOS,))


def test_turns_end_with_the_token_that_ends_them_and_documents_with_theirs(chatty: Any) -> None:
    chat = ([5, 6, 7, TURN, BREAK, 5, 8, TURN], [0, 0, 1, 1, 0, 0, 1, 1])
    found = measured_ends(packed(chat, text(9, 9, EOS)), chatty, (EOS,))
    assert found == Ends(tokens=(TURN, EOS))


def test_a_line_break_that_is_learned_after_a_turn_ends_nothing(chatty: Any) -> None:
    chat = ([5, 6, 7, TURN, BREAK, 5, 8, TURN, BREAK], [0, 0, 1, 1, 1, 0, 1, 1, 1])
    assert measured_ends(packed(chat), chatty, (EOS,)).tokens == (TURN,)


def test_a_token_within_answers_does_not_end_them(chatty: Any) -> None:
    thought = ([5, 7, PART, 8, TURN], [0, 1, 1, 1, 1])
    cut = ([5, 7, PART], [0, 1, 1])
    assert measured_ends(packed(thought, thought, cut), chatty, (EOS,)).tokens == (TURN,)


def test_a_separator_within_a_file_of_several_documents_still_ends_them(tokenizer: Any) -> None:
    joined = text(7, EOS, 8, EOS, 9, EOS)
    assert measured_ends(packed(joined), tokenizer, (EOS,)) == Ends(tokens=(EOS,))


def test_an_ordinary_token_ends_documents_that_do_not_contain_it(tokenizer: Any) -> None:
    found = measured_ends(packed(text(7, 8, BREAK), text(8, 7, BREAK)), tokenizer, (BREAK,))
    assert found == Ends(tokens=(BREAK,))


def test_an_ordinary_token_that_documents_contain_does_not_end_them(tokenizer: Any) -> None:
    documents = packed(text(7, BREAK, 8, BREAK), text(8, BREAK, BREAK))
    found = measured_ends(documents, tokenizer, (BREAK,))
    assert found.tokens == ()
    assert f"end with {tokenizer.decode([BREAK])!r}, which also stands inside" in found.lack


def test_of_a_separator_of_several_tokens_the_special_one_ends_documents(chatty: Any) -> None:
    for separator in ((BREAK, TURN), (TURN, BREAK), (TURN, BREAK, BREAK)):
        documents = packed(text(7, BREAK, 8, *separator), text(9, BREAK, *separator))
        assert measured_ends(documents, chatty, separator) == Ends(tokens=(TURN,))


def test_a_separator_of_several_ordinary_tokens_is_named(tokenizer: Any) -> None:
    found = measured_ends(packed(text(7, 8, 50, 51), text(9, 50, 51)), tokenizer, (50, 51))
    assert found.tokens == ()
    said = f"end with {tokenizer.decode([50, 51])!r}, which is 2 tokens, so no token tells"
    assert said in found.lack


@pytest.mark.parametrize(
    ("separator", "said"),
    [((), "nothing stands after its documents"), ((EOS,), "none of its texts ends with a token")],
)
def test_texts_without_an_end_are_told_of(
    tokenizer: Any, separator: tuple[int, ...], said: str
) -> None:
    found = measured_ends(packed(text(7, 8), text(9, 9)), tokenizer, separator)
    assert found.tokens == ()
    assert said in found.lack


def test_pieces_of_a_long_document_end_nothing(chatty: Any) -> None:
    whole = [text(7, 8, EOS)] * 1001
    found = measured_ends(packed(*whole, text(7, 8, PART)), chatty, (EOS,))
    assert found.tokens == (EOS,)


def test_nothing_supervised_ends_nothing(tokenizer: Any) -> None:
    assert measured_ends(packed(([7, 8, EOS], [0, 0, 0])), tokenizer, (EOS,)) == Ends()
    assert measured_ends([], tokenizer, (EOS,)) == Ends()


@pytest.mark.parametrize(("own", "ends"), [(None, ()), (3, (3,)), ([3, 4], (3, 4))])
def test_a_model_has_ends_of_its_own(own: Any, ends: tuple[int, ...], tokenizer: Any) -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config.eos_token_id = model.config.eos_token_id = own
    assert own_ends(model) == ends
    assert end_tokens(model, tokenizer) == {*ends, EOS}


@pytest.mark.parametrize(
    ("own", "tokens", "expected"),
    [(None, (7,), 7), (3, (7,), [7, 3]), ([3, 4], (4, 7), [4, 7, 3])],
)
def test_a_model_stops_at_new_ends_and_at_its_own(
    own: Any, tokens: tuple[int, ...], expected: Any
) -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config.eos_token_id = model.config.eos_token_id = own
    assert stop_at(model, tokens)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == expected


@pytest.mark.parametrize(("own", "tokens"), [(None, ()), (3, (3,)), ([3, 4], (4,))])
def test_ends_that_a_model_has_change_nothing(own: Any, tokens: tuple[int, ...]) -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config.eos_token_id = model.config.eos_token_id = own
    assert not stop_at(model, tokens)
    assert model.generation_config.eos_token_id == own


def test_a_model_without_settings_for_generation_gets_some() -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config, model.config.eos_token_id = None, None
    assert stop_at(model, (7,))
    assert model.generation_config.eos_token_id == 7


def test_only_a_tokenizer_without_an_end_gets_one(chatty: Any) -> None:
    assert with_end(chatty, (TURN,)).eos_token_id == EOS
    chatty.eos_token = None
    assert with_end(chatty, ()).eos_token_id is None
    assert with_end(chatty, (TURN,)).eos_token_id == TURN


@pytest.mark.parametrize(
    ("template", "ends", "measured", "slots"),
    [
        (None, (5, 6), (), [EOS, 5, 6]),  # nothing measured: the tokenizer's own stays the first
        (None, (TURN, EOS), (TURN,), [TURN, EOS]),
        (None, (TURN, EOS), (TURN, EOS), [EOS, TURN]),
        ("{{ eos_token }}", (TURN, EOS), (TURN,), [EOS, TURN]),  # it is written for it
        (None, (TURN, 5, 6, EOS), (TURN,), [TURN, EOS, 5, 6]),
    ],
)
def test_llama_cpp_gets_the_ends_in_an_order_that_keeps_what_uses_the_first(
    chatty: Any, template: Any, ends: Any, measured: Any, slots: list[int]
) -> None:
    chatty.chat_template = template
    assert end_slots(chatty, ends, measured) == slots
    chatty.eos_token = None
    assert end_slots(chatty, ends, measured)[0] == (measured or ends)[0]
