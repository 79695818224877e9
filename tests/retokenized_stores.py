"""Fixtures: tokenizers of every kind, and stores of random records in the tokens of one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from retokenizing import ADDED, CAPTURES, JOINED, MERGES, REMOVED, TEXTS
from spellings import byte_pairs, characters, pieces, saved, text_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of every kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in {
        "teacher": byte_pairs(MERGES),
        "permuted": byte_pairs(MERGES, order=1),
        "added": byte_pairs(ADDED, order=2),
        "removed": byte_pairs(REMOVED),
        "bytes": byte_pairs([]),
        "joined": byte_pairs(JOINED),
        "extra": byte_pairs(MERGES, extra=["<|more|>"]),
        "characters": characters("".join(TEXTS)),
    }.items():
        saved(root / name, tokenizer)
    words = ["▁", "t", "h", "e", "th", "the", "▁the", "1", "2", "12", "u", "n", "un", "▁un", "l"]
    roles = {"bos_token": "<s>", "unk_token": "<unk>"}
    saved(root / "pieces", pieces(words), end="</s>", roles=roles)
    return root


@pytest.fixture(scope="module")
def stores(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A store of random records in the teacher's tokens, by its capture, codec and format."""
    made: dict[tuple[str, str, str], str] = {}
    root = tmp_path_factory.mktemp("stores")

    def store(capture: str = "samples", codec: str = "plain", form: str = "arrow") -> str:
        key = capture, codec, form
        if key not in made:
            path = root / "-".join(key)
            text_store(
                path, folder / "teacher", TEXTS, CAPTURES[capture], codec=codec, store=form,
                shard_sequences=2, block_sequences=1,
            )  # fmt: skip
            made[key] = str(path)
        return made[key]

    return store
