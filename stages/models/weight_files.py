"""The files of a folder from which transformers loads weights, by their names. Imports no torch.

A folder may hold the same weights twice (`consolidated.safetensors` beside `model.safetensors`),
and files that are not weights (`optimizer.pt`, `training_args.bin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""transformers loads the first of these files that exists."""
INDEX_END = ".index.json"


def weight_files_in(folder: Path) -> list[Path]:
    """The existing weight files of a model's folder; empty if it has no weights."""
    found = next((folder / name for name in ORDER if (folder / name).is_file()), None)
    if found is None:
        return []
    if not found.name.endswith(INDEX_END):
        return [found]
    return [path for shard in shards(found) if (path := folder / shard).is_file()]


def shards(index: Path) -> list[str]:
    """The weight files that an index lists.

    Raises
        ColdstillError: the index lists no weight files
    """
    match read_json(index):
        case {"weight_map": dict(listed)} if listed and all(
            isinstance(shard, str) for shard in listed.values()
        ):
            return sorted(set(listed.values()))
    raise ColdstillError(
        f"{index}: no weight_map that names weight files; fetch or save the model again"
    )
