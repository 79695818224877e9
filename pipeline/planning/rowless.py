"""Tokens that a teacher's model has no row for, told from JSON files alone.

Stage one refuses or leaves out such tokens (`stages.models.vocabulary`); a plan says so before a
deep-learning stack is loaded.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...data.corpus import BadRowError, list_sources, read_documents
from ...data.errors import ColdstillError
from ...data.prepared import CorpusLayout
from .loadable import folder_of, own_models

if TYPE_CHECKING:
    from pathlib import Path

    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run

_NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")
_DOCUMENTS = 20_000
"""Of a corpus that is not prepared yet, so many are searched for such tokens."""


def left_out_tokens(loaded: LoadedRecipe, run: Run) -> list[str]:
    """Tokens that stage one will leave out of the vocabulary.

    Raises
        ColdstillError: a token that is refused: one that the teacher or a student needs, or that a
            text contains
    """
    from ...stages.models.vocabulary import rowless_in

    for where, model, revision, _ in own_models(loaded, run):
        _left_out_of(folder_of(loaded, run, model, revision), where)
    table = loaded.recipe.teacher
    if table.model is None:
        return []
    rowless = _left_out_of(folder_of(loaded, run, table.model, table.revision), "teacher.model")
    if rowless:
        separator = loaded.recipe.corpus.separator or ""
        for token in rowless:
            if token in separator:
                raise ColdstillError(f"corpus.separator: {rowless_in(token)}")
    skipped = loaded.recipe.corpus.bad_rows == "skip"
    if rowless and not skipped and CorpusLayout(run.corpus).read_record() is None:
        _expect_in_no_text(loaded, rowless)
    return sorted(rowless)


def _left_out_of(folder: Path | None, where: str) -> dict[str, int]:
    """Tokens of a model's tokenizer that it has no row for and can do without.

    Raises
        ColdstillError: one that it cannot do without
    """
    found = None if folder is None else _tokens(folder)
    if found is None:
        return {}
    rows, base, added, roles = found
    for token, index in sorted(base.items(), key=lambda pair: pair[1]):
        if index >= rows:
            raise _refused(where, token, index, rows, "it is one of its vocabulary")
    rowless = {token: index for token, index in added.items() if index >= rows}
    for token, index in rowless.items():
        if (role := roles.get(token)) is not None:
            use = "sequences are padded with it" if role == "pad_token" else "texts need it"
            raise _refused(where, token, index, rows, f"it is its {role}: {use}")
    return rowless


def _refused(where: str, token: str, index: int, rows: int, use: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: its tokenizer has the token {token!r} at id {index}, its model has {rows} rows "
        f"(ids 0 to {rows - 1}), and {use}; take the token out of the tokenizer's files, or "
        "resize the model's embeddings and train the new row"
    )


def _expect_in_no_text(loaded: LoadedRecipe, tokens: dict[str, int]) -> None:
    from ...stages.models.vocabulary import rowless_in

    corpus = loaded.recipe.corpus
    columns = corpus.columns
    if loaded.recipe.teacher.generate is not None:
        columns = columns.for_prompts()
    sources = list_sources(corpus.files, loaded.base)
    for document in islice(read_documents(sources, columns), _DOCUMENTS):
        text = document.prompt + document.text
        text += json.dumps(document.messages, ensure_ascii=False) if document.messages else ""
        for token in tokens:
            if token in text:
                raise BadRowError("rowless_tokens", document.where, rowless_in(token))


def _tokens(folder: Path) -> tuple[int, dict[str, int], dict[str, int], dict[str, str]] | None:
    """Rows of the model, tokens of the vocabulary, added tokens, and the roles of needed ones; None
    if the files do not say."""
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
            if token not in base and token not in added:  # added as it is loaded, behind all others
                added[token] = max([*base.values(), *added.values()], default=-1) + 1
    return rows, base, added, roles


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # told when the model is loaded
    return found if isinstance(found, dict) else {}
