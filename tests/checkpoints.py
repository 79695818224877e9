"""Checkpoints with something wrong with their weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from conftest import VOCABULARY, make_model
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    State = dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path,
    tokenizer: Any,
    change: Callable[[State], State] = dict,
    family: str = "llama",
    **settings: Any,
) -> Path:
    """A small model with its tokenizer, its weights changed.

    settings  written into config.json afterwards
    """
    make_model(family, VOCABULARY).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "model.safetensors"
    changed = {key: tensor.clone() for key, tensor in change(load_file(path)).items()}
    save_file(changed, path, {"format": "pt"})
    configure(folder, **settings)
    return folder


def configure(folder: Path, **settings: Any) -> None:
    """Write settings into a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def renamed(rename: Callable[[str], str | None]) -> Callable[[State], State]:
    """The weights under other names; what gets no name is left out."""
    return lambda state: {
        name: tensor for key, tensor in state.items() if (name := rename(key)) is not None
    }
