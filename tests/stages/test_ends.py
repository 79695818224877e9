"""End tokens are measured where documents, answers and turns end."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.stages.capture.generate import end_tokens
from coldstill.stages.export.gguf.writer import end_slots
from coldstill.stages.models.ends import Ends, measured_ends, own_ends, stop_at, with_end
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences

EOS = 0
BREAK = 10 + 40
"""An ordinary token that stands for a line break."""


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    """A tokenizer with tokens for the ends of turns and of thoughts."""
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|turn_end|>", "<|part_end|>"]})
    return chatty


TURN, PART = VOCABULARY, VOCABULARY + 1


def packed(*documents: tuple[list[int], list[int]]) -> list[Sequences]:
    """Documents in one sequence: token ids, and 1 for each supervised one."""
    pieces = [
        TokenizedDocument(i, np.array(tokens, np.int32), np.array(learned, np.bool_))
        for i, (tokens, learned) in enumerate(documents)
    ]
    return [build_sequences(0, [pieces])]


def text(*tokens: int) -> tuple[list[int], list[int]]:
    """A plain document."""
    return list(tokens), [1] * len(tokens)


CHAT = ([5, 6, 7, TURN, BREAK, 5, 8, TURN], [0, 0, 1, 1, 0, 0, 1, 1])
SUPERVISED_BREAK = ([5, 6, 7, TURN, BREAK, 5, 8, TURN, BREAK], [0, 0, 1, 1, 1, 0, 1, 1, 1])
THOUGHT, CUT = ([5, 7, PART, 8, TURN], [0, 1, 1, 1, 1]), ([5, 7, PART], [0, 1, 1])
UNLEARNED = ([7, 8, EOS], [0, 0, 0])


@pytest.mark.parametrize(
    ("documents", "separator", "expected"),
    [
        pytest.param([text(7, 8, EOS), text(9, 7, 5, EOS)], (EOS,), (EOS,), id="separator"),
        pytest.param([CHAT, text(9, 9, EOS)], (EOS,), (TURN, EOS), id="turns and documents"),
        pytest.param([SUPERVISED_BREAK], (EOS,), (TURN,), id="supervised line break after a turn"),
        pytest.param([THOUGHT, THOUGHT, CUT], (EOS,), (TURN,), id="token inside answers"),
        pytest.param([text(7, EOS, 8, EOS, 9, EOS)], (EOS,), (EOS,), id="joined documents"),
        pytest.param(
            [text(7, 8, BREAK), text(8, 7, BREAK)], (BREAK,), (BREAK,), id="ordinary token"
        ),
        *(
            pytest.param([text(7, BREAK, 8, *end), text(9, BREAK, *end)], end, (TURN,), id=str(end))
            for end in ((BREAK, TURN), (TURN, BREAK), (TURN, BREAK, BREAK))
        ),
        pytest.param(
            [*[text(7, 8, EOS)] * 1001, text(7, 8, PART)], (EOS,), (EOS,), id="pieces of documents"
        ),
        pytest.param([UNLEARNED], (EOS,), (), id="nothing supervised"),
        pytest.param([], (EOS,), (), id="no documents"),
    ],
)
def test_end_tokens_are_measured_where_supervised_parts_end(
    documents: list[Any], separator: tuple[int, ...], expected: tuple[int, ...], chatty: Any
) -> None:
    sequences = packed(*documents) if documents else []
    assert measured_ends(sequences, chatty, separator) == Ends(tokens=expected)


@pytest.mark.parametrize(
    ("documents", "separator", "lack"),
    [
        ([text(7, BREAK, 8, BREAK), text(8, BREAK, BREAK)], (BREAK,), "{}, which also occurs insi"),
        ([text(7, 8, 50, 51), text(9, 50, 51)], (50, 51), "{}, which is 2 tokens, so no token te"),
        ([text(7, 8), text(9, 9)], (), "no token follows its documents"),
        ([text(7, 8), text(9, 9)], (EOS,), "none of its texts ends with an end token"),
    ],
)
def test_missing_end_tokens_are_explained(
    documents: list[Any], separator: tuple[int, ...], lack: str, tokenizer: Any
) -> None:
    found = measured_ends(packed(*documents), tokenizer, separator)
    assert found.tokens == ()
    assert lack.format(repr(tokenizer.decode(list(separator)))) in found.lack


@pytest.mark.parametrize(("own", "ends"), [(None, ()), (3, (3,)), ([3, 4], (3, 4))])
@pytest.mark.parametrize("new", [(), (7,), (4, 7)])
def test_a_model_stops_at_its_own_ends_and_at_new_ones(
    own: Any, ends: tuple[int, ...], new: tuple[int, ...], tokenizer: Any
) -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config.eos_token_id = model.config.eos_token_id = own
    assert own_ends(model) == ends
    assert end_tokens(model, tokenizer) == {*ends, EOS}
    assert not stop_at(model, ends)
    assert model.generation_config.eos_token_id == own
    assert stop_at(model, new) == bool(set(new) - {*ends})
    expected = [*new, *(end for end in ends if end not in new)] if new else list(ends)
    for settings in (model.generation_config, model.config):
        found = settings.eos_token_id
        assert (found if isinstance(found, list) else [found] if found else []) == expected


def test_a_model_without_generation_settings_gets_some() -> None:
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
        (None, (5, 6), (), [EOS, 5, 6]),  # nothing measured: the tokenizer's own stays first
        (None, (TURN, EOS), (TURN,), [TURN, EOS]),
        (None, (TURN, EOS), (TURN, EOS), [EOS, TURN]),
        ("{{ eos_token }}", (TURN, EOS), (TURN,), [EOS, TURN]),  # the template writes it
        (None, (TURN, 5, 6, EOS), (TURN,), [TURN, EOS, 5, 6]),
    ],
)
def test_llama_cpp_gets_the_ends_in_an_order_that_keeps_the_first_useful(
    chatty: Any, template: Any, ends: Any, measured: Any, slots: list[int]
) -> None:
    chatty.chat_template = template
    assert end_slots(chatty, ends, measured) == slots
    chatty.eos_token = None
    assert end_slots(chatty, ends, measured)[0] == (measured or ends)[0]
