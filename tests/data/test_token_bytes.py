"""The bytes of tokens add up to the text."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.token_bytes import TokenBytes
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

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
    counts = table.counts(tokenizer.get_vocab_size())
    assert counts is not None
    assert int(counts.lengths_V[ids].sum()) == len(TEXT.encode())
    assert counts.lengths_V[ids].max() > 1 or make is byte_fallback


def test_special_tokens_are_not_text_but_added_words_are() -> None:
    tokenizer = byte_level()
    table = TokenBytes(tokenizer)
    end, word = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("naïve")
    counts = table.counts(tokenizer.get_vocab_size() + 8)
    assert counts is not None
    lengths = counts.lengths_V
    assert table.of(end) == b"<|end|>"
    assert lengths[end] == 0
    assert lengths[word] == len("naïve".encode())
    assert (lengths[-8:] == 0).all()  # rows of a padded model
    assert lengths.dtype == np.int64
    assert table.of(tokenizer.get_vocab_size()) is None


def word_pieces() -> Any:
    pieces = ["[UNK]", "the", "play", "##ing", "##s", ".", ",", "caf", "##\u00e9", "don", "'", "t"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def ends_of_words() -> Any:
    pieces = ["the</w>", "play", "ing</w>", "s</w>", "caf", "\u00e9</w>", "the", "play</w>"]
    letters = [f"{letter}{end}" for letter in "theplayingscaf\u00e9.," for end in ("", "</w>")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*letters, *pieces]))}
    merges = [("t", "h"), ("th", "e"), ("th", "e</w>"), ("i", "n"), ("in", "g</w>")]
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(["th", "in"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _sentence_pieces() -> Any:
    pieces = ["\u2581the", "\u2581", *"theplayingscaf.,'d o", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(
        models.BPE(
            vocab=vocabulary | {"\u2581t": 400, "\u2581th": 401},
            merges=[("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")],
            byte_fallback=True,
        )
    )


def metaspace() -> Any:
    tokenizer = _sentence_pieces()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def like_llama() -> Any:
    tokenizer = _sentence_pieces()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


KINDS: dict[str, tuple[Any, str]] = {
    "byte_level": (byte_level, ""),
    "byte_fallback": (byte_fallback, ""),
    "word_pieces": (word_pieces, "the"),
    "ends_of_words": (ends_of_words, "the "),
    "metaspace": (metaspace, "the"),
    "like_llama": (like_llama, "the"),
}
"""How each tokenizer is made, and the first token of the text below; empty if it varies."""
PLAYS = ("the playing, the plays", "the caf\u00e9", "the. the playing the caf\u00e9", "the")


@pytest.mark.parametrize("name", KINDS)
def test_labels_have_the_bytes_of_their_text(name: str) -> None:
    make, first = KINDS[name]
    for begin, end in itertools.product((False, True), repeat=2):
        tokenizer = make()
        tokenizer.add_special_tokens(["<begin>", "<end>"])
        starts = [tokenizer.token_to_id("<begin>")] * begin
        ends = [tokenizer.token_to_id("<end>")] * end
        plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in PLAYS]
        rows = [np.array([*starts, *ids, *ends], np.int32) for ids in plain]
        documents = [TokenizedDocument(i, row, row >= 0) for i, row in enumerate(rows)]
        sequences = build_sequences(0, [documents[:3], documents[3:]])
        table = TokenBytes(tokenizer)
        counts = table.counts(tokenizer.get_vocab_size() + 200)
        assert counts is not None
        texts = [tokenizer.decode(ids) for ids in plain]
        expected = sum(len(text.encode()) for text in texts)
        if not begin:  # the first token of a document is not a label
            # nothing follows the last text's only token
            firsts = [min(first, text, key=len).encode() for text in texts]
            if not first:
                firsts = [table.of(ids[0]) or b"" for ids in plain]
            expected -= sum(map(len, firsts))
        assert counts.of_labels(sequences) == expected


def test_no_bytes_are_counted_with_an_unknown_decoder() -> None:
    for decoder in (None, decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.CTC()])):
        tokenizer = word_pieces()
        if decoder is None:
            tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        else:
            tokenizer.decoder = decoder
        table = TokenBytes(tokenizer)
        assert not table.known
        assert table.counts(8) is None
        assert table.of(0) is not None
