"""Tokens for which a model has no row, found in JSON files only.

Stage one refuses or leaves out such tokens (`stages.models.vocabulary`). A plan does the same
without loading torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...data.corpus.document import BadRowError
from ...data.corpus.formats import read_documents
from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.prepared import CorpusLayout
from .models import folder_of, student_models

if TYPE_CHECKING:
    from pathlib import Path

    from ..recipe.work import Work

_NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")
_DOCUMENTS = 20_000
"""Documents that are searched for such tokens if the corpus is not prepared yet."""


def left_out_tokens(work: Work) -> list[str]:
    """Tokens that stage one will leave out of the vocabulary.

    Raises
        ColdstillError: a token that is refused, because the teacher or a student needs it or a text
            contains it
    """
    from ...stages.models.vocabulary import rowless_in

    for named in student_models(work):
        _rowless(folder_of(work, named.model, named.revision), named.key)
    table, corpus = work.recipe.teacher, work.recipe.corpus
    if table.model is None:
        return []
    rowless = _rowless(folder_of(work, table.model, table.revision), "teacher.model")
    for token in rowless:
        if token in (corpus.separator or ""):
            raise ColdstillError(f"corpus.separator: {rowless_in(token)}")
    prepared = CorpusLayout(work.run.corpus).read_record() is not None
    if rowless and corpus.bad_rows != "skip" and not prepared:
        _expect_in_no_text(work, rowless)
    return sorted(rowless)


def _rowless(folder: Path | None, where: str) -> list[str]:
    """Tokens of a tokenizer for which its model has no row and which are not needed.

    Raises
        ColdstillError: a token is needed
    """
    found = None if folder is None else _read_tokens(folder)
    if found is None:
        return []
    for token, index in sorted(found.vocabulary.items(), key=lambda pair: pair[1]):
        if index >= found.rows:
            raise _refused(
                where,
                token,
                index,
                found.rows,
                "the token is one of its vocabulary, so any text may contain it",
            )
    rowless = {token: index for token, index in found.added.items() if index >= found.rows}
    for token, index in rowless.items():
        if (role := found.roles.get(token)) is not None:
            use = "sequences are padded with it" if role == "pad_token" else "texts need it"
            raise _refused(where, token, index, found.rows, f"it is its {role}: {use}")
    return list(rowless)


def _refused(where: str, token: str, index: int, rows: int, use: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: its tokenizer has the token {token!r} at id {index}, its model has {rows} rows "
        f"(ids 0 to {rows - 1}), and {use}; take the token out of the tokenizer's files, or "
        "resize the model's embeddings and train the new row"
    )


def _expect_in_no_text(work: Work, tokens: list[str]) -> None:
    from ...stages.models.vocabulary import rowless_in

    corpus = work.recipe.corpus
    columns = corpus.columns
    if work.recipe.teacher.generate is not None:
        columns = columns.for_prompts()
    sources = list_sources(corpus.files, work.loaded.base)
    for document in islice(read_documents(sources, columns), _DOCUMENTS):
        text = document.prompt + document.text
        text += json.dumps(document.messages, ensure_ascii=False) if document.messages else ""
        for token in tokens:
            if token in text:
                raise BadRowError("rowless_tokens", document.where, rowless_in(token))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of a tokenizer, by id, and the size of its model."""

    rows: int
    """Rows of the model's embedding."""
    vocabulary: dict[str, int]
    added: dict[str, int]
    roles: dict[str, str]
    """Role of each needed token, such as `eos_token`."""


def _read_tokens(folder: Path) -> _Tokens | None:
    """The tokens of a model's folder; None if its files are incomplete."""
    config = _json(folder / "config.json")
    rows = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    tokenizer, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # of tokens with their scores
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
        decoder = settings.get("added_tokens_decoder") or {}
        added |= {each["content"]: int(index) for index, each in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not isinstance(rows, int):
        return None
    base = {token: index for token, index in vocabulary.items() if token not in added}
    roles: dict[str, str] = {}
    for role in _NEEDED:
        named = settings.get(role)
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            roles[token] = role
            if token not in base and token not in added:  # loading appends it after all others
                added[token] = max([*base.values(), *added.values()], default=-1) + 1
    return _Tokens(rows, base, added, roles)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # loading the model reports it
    return found if isinstance(found, dict) else {}
