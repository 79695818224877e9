"""The real vocabulary of a tokenizer, rows of a model, and comparing two tokenizers."""

from __future__ import annotations

import json
from typing import Any

from ...data.errors import ColdstillError
from ...data.files import tokens_sha256
from ...data.store.manifest import TokenizerIdentity

_NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Roles whose tokens are written into sequences or pad them."""
_UNUSED = ("sep_token", "cls_token", "mask_token")
"""Roles that causal language models do not use."""
_LEFT_OUT = "_coldstill_left_out"


def vocabulary_rows(config: Any) -> int | None:
    """Rows of a model's embedding by its configuration; None if it does not state them."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def expect_rows(model: Any, vocabulary: int, where: str) -> None:
    """Refuse a model whose head or embedding has no row for some token."""
    tables = {"head": model.get_output_embeddings(), "embedding": model.get_input_embeddings()}
    for name, table in tables.items():
        weight = getattr(table, "weight", None)
        if weight is not None and weight.shape[0] < vocabulary:
            raise ColdstillError(
                f"{where}: its {name} has {weight.shape[0]} rows, the tokenizer has {vocabulary} "
                "tokens"
            )


def without_rowless(tokenizer: Any, rows: int | None, where: str) -> Any:
    """Remove the added tokens for which the model has no row; returns the same tokenizer.

    The tokenizer is changed in place, so that saved copies fit the model too. A text that contains
    a removed token must be refused (`left_out_in`): it would be split into other tokens.

    rows  rows of the model's embedding; None if its configuration does not state them

    Raises
        ColdstillError: a token without a row is not an added token, or it is needed: it pads,
            begins or ends texts, or the tokenizer adds it to every text
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
    """Why a token is needed; None if it is not."""
    if index not in tokenizer.added_tokens_decoder:
        return "the token is one of its vocabulary, so any text may contain it"
    for role in _NEEDED:
        if getattr(tokenizer, role) == token:
            purpose = "sequences are padded with it" if role == "pad_token" else "texts need it"
            return f"the token is its {role}: {purpose}"
    if index in tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids:
        return "the tokenizer adds the token to every text"
    return None


def left_out_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that `without_rowless` removed from a tokenizer."""
    return getattr(tokenizer, _LEFT_OUT, ())


def left_out_in(tokenizer: Any, text: str) -> str | None:
    """Why a text cannot be tokenised: it contains a removed token. None if it contains none."""
    found = (rowless_in(token) for token in left_out_tokens(tokenizer) if token in text)
    return next(found, None)


def rowless_in(token: str) -> str:
    """The fault of a text that contains a token without a row in the model."""
    return (
        f"contains the token {token!r}, for which the model has no row; "
        "remove it from the text, or resize the model's embeddings and train the new row"
    )


def vocabulary_size(tokenizer: Any) -> int:
    """V, size of the real vocabulary: one more than the largest token id."""
    return int(max(tokenizer.get_vocab().values())) + 1


def without_padding(model: Any, vocabulary: int) -> Any:
    """Cut embedding and head to the real vocabulary; returns the same model.

    Rows past it are padding: sampling from all rows could produce ids without a token.

    vocabulary  V, at most the number of rows
    """
    if model.get_output_embeddings().weight.shape[0] == vocabulary:
        return model
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None and embedding.padding_idx >= vocabulary:
        embedding.padding_idx = None  # its row is removed
    config = model.config.get_text_config()
    if isinstance(config.pad_token_id, int) and config.pad_token_id >= vocabulary:
        config.pad_token_id = None
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Fingerprint and size of a tokenizer, as a store records them."""
    return TokenizerIdentity(
        fingerprint=tokens_sha256(tokenizer.get_vocab()), size=vocabulary_size(tokenizer)
    )


def expect_same_tokens(tokenizer: Any, other: Any, where: str) -> None:
    """Refuse a student's tokenizer that gives an id another token than the teacher's.

    The tables are compared token by token. Two models of one family may differ in padded size and
    share all tokens, and two vocabularies of equal size may share none.
    """
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ColdstillError(
                f"{where}: its tokenizer is not the teacher's: id {index} is "
                f"{theirs.get(index)!r}, the teacher's is {ours.get(index)!r}; a student must "
                "share the teacher's tokens"
            )
