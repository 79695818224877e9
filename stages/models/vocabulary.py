"""Which ids are tokens, and whether two tokenizers mean the same by them."""

from __future__ import annotations

from typing import Any

from ...data.errors import ColdstillError
from ...data.fingerprint import tokens_sha256
from ...data.manifest import TokenizerIdentity


def vocabulary_size(tokenizer: Any) -> int:
    """V, the real vocabulary: one past the largest id that stands for a token."""
    return int(max(tokenizer.get_vocab().values())) + 1


def without_padding(model: Any, vocabulary: int) -> Any:
    """The model itself, its embedding and head cut to the rows that are tokens: rows past them are
    padding, and whoever draws from all of them writes tokens that do not exist.

    vocabulary  V, no more than it has rows
    """
    if model.get_output_embeddings().weight.shape[0] == vocabulary:
        return model
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None and embedding.padding_idx >= vocabulary:
        embedding.padding_idx = None  # its row goes
    config = model.config.get_text_config()
    if isinstance(config.pad_token_id, int) and config.pad_token_id >= vocabulary:
        config.pad_token_id = None
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """What a store records of a tokenizer."""
    return TokenizerIdentity(
        fingerprint=tokens_sha256(tokenizer.get_vocab()), size=vocabulary_size(tokenizer)
    )


def expect_same_tokens(tokenizer: Any, other: Any, who: str) -> None:
    """Refuse a student whose ids mean something else.

    Compares the tables token by token: two models of one family often differ in padded size and
    still share their tokens, and two of equal size may share none.

    Raises
        ColdstillError: the first id that differs, with both tokens
    """
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ColdstillError(
                f"{who}: its tokenizer is not the teacher's: id {index} is "
                f"{theirs.get(index)!r}, the teacher's is {ours.get(index)!r}; a student must "
                "share the teacher's tokens"
            )
