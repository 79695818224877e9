"""Ids as text, for every kind of tokenizer, without letting a corpus speak to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.store.reader import open_store
from coldstill.data.token_bytes import TokenBytes
from coldstill.pipeline.pages.inspect.text import ASCII, BLOCKS
from coldstill.pipeline.results.token_texts import TokenTexts, token_texts
from inspected import TOKENS, write_store
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "one two\n\n    three\tna\u00efve \u65e5\u672c \U0001f600 \u0394"


def words(tokens: list[str], decoder: Any = None) -> TokenTexts:
    """Texts of a tokenizer with exactly this table."""
    model: Any = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    return TokenTexts(TokenBytes(tokenizer))


def test_tokens_of_bytes_put_together_are_the_text() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["one two three one two three"], trainer)
    texts = TokenTexts(TokenBytes(tokenizer))
    ids = tokenizer.encode(TEXT).ids
    # what is no whole character is a byte, seen as one: all of the text is still there
    together = "".join(texts.of(index) for index in ids)
    assert together == TEXT.encode().decode("ascii", "backslashreplace")
    assert tokenizer.id_to_token(0) == texts.of(0) == "<|end|>"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ],
    ids=["metaspace", "llama"],
)
def test_a_leading_blank_is_kept(decoder: Any) -> None:
    texts = words(["\u2581the", "\u2581\u2581", "the", "\u2581"], decoder)
    assert [texts.of(i) for i in range(4)] == [" the", "  ", "the", " "]


def test_a_byte_that_stands_for_itself() -> None:
    fallback = words(["<0x0A>", "<0xE2>", "<0x41>"], decoders.Sequence([decoders.ByteFallback()]))
    assert [fallback.of(i) for i in range(3)] == ["\n", "\\xe2", "A"]
    assert words(["<0x0A>"]).of(0) == "<0x0A>"  # of a tokenizer that has no such bytes


def test_invisible_characters_are_escaped() -> None:
    shown = ["\x1b[31m", "\u202e", "\u2028", "\r", "\x00", "\u200b", "\xa0", "\ue000", "", "\ufeff"]
    texts = words(shown)
    assert [texts.of(i) for i in range(len(shown))] == [
        "\\x1b[31m",
        "\\u202e",
        "\\u2028",
        "\\r",
        "\\x00",
        "\\u200b",
        "\\xa0",
        "\\ue000",
        '""',
        "\\ufeff",
    ]


def test_an_added_token_is_its_content_and_an_unknown_id_its_number() -> None:
    model: Any = models.WordLevel({"a": 0}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<\u2581\u0120>")])
    texts = TokenTexts(TokenBytes(tokenizer))
    assert texts.of(1) == "<\u2581\u0120>"
    assert texts.of(7) == "#7"
    assert not texts.lack


def test_a_store_without_a_tokenizer_shows_ids(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert token_texts(store).of(9) == TOKENS[9]
    (store.tokenizer_folder() / "tokenizer.json").write_text("{", encoding="utf-8")
    damaged = token_texts(store)
    assert damaged.of(9) == "#9"
    assert "tokenizer.json: " in damaged.lack
    assert damaged.lack.endswith(": ids are shown instead of text")
    (store.tokenizer_folder() / "tokenizer.json").unlink()
    missing = token_texts(store)
    assert missing.of(9) == "#9"
    assert missing.lack == "no tokenizer.json in the store: ids are shown instead of text"


def test_a_token_is_visible_on_every_terminal() -> None:
    assert BLOCKS.visible(" a\n\tb") == "\u00b7a\u21b5\u21e5b"
    assert ASCII.visible(" a\n\tb\u65e5") == '" a\\n\\tb\\u65e5"'
    assert all(ASCII.visible(token).isascii() for token in np.array(TOKENS))
