"""The lengths at which a model may begin to treat a text otherwise, as its configuration names
them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES = frozenset(
    {
        "original_max_position_embeddings",  # rotary scaling: longrope, yarn, llama3
        "max_position_embeddings",  # where dynamic scaling begins
        "sliding_window", "sliding_window_size", "window_size", "attention_window",
        "attention_window_size", "local_attention", "local_window_size", "window_length",
        "attention_chunk_size",  # attention within chunks
        "floor_scale",  # queries that are scaled by their place
        "block_size", "chunk_size", "chunk_length",
    }
)  # fmt: skip


def borders(config: Any, sequence_length: int) -> list[int]:
    """Lengths below `sequence_length` at which something in the model changes, increasing.

    config  of the model or of its text part, with whatever tables it nests
    """
    found = {
        value
        for name, value in _settings(config.get_text_config().to_dict())
        if name in _NAMES and isinstance(value, int) and 1 < value < sequence_length
    }
    return sorted(found)


def _settings(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings with their names, those of nested tables and lists included."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _settings(value)
        elif isinstance(value, list):
            yield from ((name, each) for each in value)
        else:
            yield name, value
