"""Which ids are tokens, and whether two tokenizers mean the same by them."""

from __future__ import annotations

import json
from typing import Any

from ...data.errors import ColdstillError
from ...data.fingerprint import tokens_sha256
from ...data.store.manifest import TokenizerIdentity

_NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Roles whose tokens are written into sequences, or fill them up;"""
_UNUSED = ("sep_token", "cls_token", "mask_token")
"""roles that causal language models have no use for."""
_LEFT_OUT = "_coldstill_left_out"


def vocabulary_rows(config: Any) -> int | None:
    """How many rows the embedding of a model has by its configuration, if that says so."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def expect_rows(model: Any, vocabulary: int, where: str) -> None:
    """Refuse a model with fewer rows than there are tokens.

    Raises
        ColdstillError: its head or its embedding has fewer than `vocabulary` rows
    """
    tables = {"head": model.get_output_embeddings(), "embedding": model.get_input_embeddings()}
    for name, table in tables.items():
        weight = getattr(table, "weight", None)
        if weight is not None and weight.shape[0] < vocabulary:
            raise ColdstillError(
                f"{where}: its {name} has {weight.shape[0]} rows, the tokenizer has {vocabulary} "
                "tokens"
            )


def without_rowless(tokenizer: Any, rows: int | None, where: str) -> Any:
    """The tokenizer without tokens that were added to it and that the model has no row for.

    They are taken out of it in place, so that copies of it fit the model too. A text that contains
    one of them must be refused (`left_out_in`): it would be read as other tokens.

    rows   of the model's embedding; None where its configuration does not say
    where  the recipe's key, for messages

    Raises
        ColdstillError: such a token is not an added one, or is needed: it pads, begins or ends
            texts, or is put around every text
    """
    if rows is None or vocabulary_size(tokenizer) <= rows:
        return tokenizer
    rowless = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    for token, index in sorted(rowless.items(), key=lambda pair: pair[1]):
        if (use := _use(tokenizer, token, index)) is not None:
            raise ColdstillError(
                f"{where}: its tokenizer has the token {token!r} at id {index}, its model has "
                f"{rows} rows (ids 0 to {rows - 1}), and {use}; take the token out of the "
                "tokenizer's files, or resize the model's embeddings and train the new row"
            )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [each for each in backend["added_tokens"] if each["id"] < rows]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    for role in _UNUSED:
        if getattr(tokenizer, role) in rowless:
            setattr(tokenizer, role, None)
    tokenizer._extra_special_tokens = [
        each for each in tokenizer._extra_special_tokens if str(each) not in rowless
    ]
    for key in ("added_tokens_decoder", "extra_special_tokens", *_UNUSED):
        tokenizer.init_kwargs.pop(key, None)
    setattr(tokenizer, _LEFT_OUT, tuple(sorted(rowless)))
    return tokenizer


def _use(tokenizer: Any, token: str, index: int) -> str | None:
    """What a token is needed for, if it is."""
    if index not in tokenizer.added_tokens_decoder:
        return "the token is one of its vocabulary, so any text may contain it"
    for role in _NEEDED:
        if getattr(tokenizer, role) == token:
            purpose = "sequences are padded with it" if role == "pad_token" else "texts need it"
            return f"the token is its {role}: {purpose}"
    if index in tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids:
        return "the token is put around every text"
    return None


def left_out_tokens(tokenizer: Any) -> tuple[str, ...]:
    """What `without_rowless` took out of a tokenizer."""
    return getattr(tokenizer, _LEFT_OUT, ())


def left_out_in(tokenizer: Any, text: str) -> str | None:
    """Why a text cannot be read: the first token in it that was taken out, since it would be read
    as other tokens; None if there is none."""
    found = (rowless_in(token) for token in left_out_tokens(tokenizer) if token in text)
    return next(found, None)


def rowless_in(token: str) -> str:
    """What is wrong with a text that contains a token without a row in the model."""
    return (
        f"contains the token {token!r}, which the tokenizer knows and the model has no row for; "
        "take it out of the text, or resize the model's embeddings and train the new row"
    )


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
