"""The bytes that tokens stand for add up to the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coldstill.data.token_bytes import TokenBytes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "The naïve café — 東京, 3 / 4 = 12\n\tend\r\n  two  spaces"


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "the text of a few words " * 9], trainer)
    tokenizer.add_tokens([AddedToken("naïve", special=False)])
    return tokenizer


def byte_fallback() -> Any:
    pieces = [
        "<s>",
        "\u2581the",
        "\u2581",
        *"Tehnaiv,3412=d",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_tokens_of_a_text_are_its_bytes(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXT).ids
    table = TokenBytes(tokenizer)
    assert b"".join(table.of(index) or b"" for index in ids) == TEXT.encode()
    lengths = table.lengths(tokenizer.get_vocab_size())
    assert int(lengths[ids].sum()) == len(TEXT.encode())
    if make is byte_level:
        assert lengths[ids].max() > 1


def test_special_tokens_are_no_text_and_added_words_are() -> None:
    tokenizer = byte_level()
    table = TokenBytes(tokenizer)
    end, word = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("naïve")
    lengths = table.lengths(tokenizer.get_vocab_size() + 8)
    assert table.of(end) == b"<|end|>"
    assert lengths[end] == 0
    assert lengths[word] == len("naïve".encode())
    assert (lengths[-8:] == 0).all()  # rows of a padded model
    assert lengths.dtype == np.int64
    assert table.of(tokenizer.get_vocab_size()) is None
