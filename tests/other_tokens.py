"""Students of a recipe that have other tokens than its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conftest import make_model
from spellings import saved

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

PAIRS = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("Ġ", "l"), ("l", "e"), ("Ġ", "a")]


def add_students(desk: Desk, *tables: str) -> None:
    """Add students `a`, `b`, ... to the recipe."""
    texts = [f"[students.{name}]\n{table}" for name, table in zip("abcd", tables, strict=False)]
    desk.edit("[students.baseline]", "\n".join([*texts, "[students.baseline]"]))


def model_of(folder: Path, tokenizer: Any, end: str, family: str = "llama") -> None:
    """A small random model with a tokenizer."""
    saved(folder, tokenizer, end=end)
    size = tokenizer.get_vocab_size()
    ids = {"eos_token_id": tokenizer.token_to_id(end)}
    make_model(family, size, max_position_embeddings=512, **ids).save_pretrained(folder)
