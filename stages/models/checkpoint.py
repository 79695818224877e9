"""The weight files of a checkpoint, found as transformers finds them, and their headers."""

from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from ...data.errors import ColdstillError
from ...data.files import read_json
from ..libraries import asking
from .weight_files import INDEX_END, ORDER, shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Shapes = dict[str, tuple[int, ...]]
"""Tensor names to shapes."""
_POINTER = b"version https://git-lfs"
_ADAPTER = "adapter_config.json"


def expect_no_adapter(folder: Path, where: str) -> None:
    """Refuse a folder with an adapter: transformers would load its base from elsewhere, or add the
    adapter to the weights beside it.

    Raises
        ColdstillError: there is one
    """
    if not (folder / _ADAPTER).is_file():
        return
    settings = read_json(folder / _ADAPTER)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if any((folder / name).is_file() for name in ORDER):
        raise ColdstillError(
            f"{where}: {folder} holds an adapter ({_ADAPTER}) beside whole weights, and "
            f"transformers would add it to them; merge it into the weights, or move {_ADAPTER} "
            "away to use them without it"
        )
    raise ColdstillError(
        f"{where}: {folder} holds an adapter of {base!r} and no model; merge the adapter into its "
        "base model (peft: merge_and_unload), save that with its tokenizer, and name that folder"
    )


def weight_files(name: str, where: str, revision: str = "main", named: Any = None) -> list[Path]:
    """The files that transformers loads the weights of a model from, by their names.

    name   a folder, or a hub name, whose files are fetched if they are not here
    named  `transformers_weights` of its configuration: a file to load in place of the usual ones

    Raises
        ColdstillError: no weights there, an index that names a file that is not there, or a
            pointer of Git LFS in place of a file
    """
    candidates = (str(named),) if named else ORDER
    with asking("huggingface_hub", f"find the weights of {name}", where=where):
        found = next(filter(None, (_file(name, each, revision) for each in candidates)), None)
    if found is None:
        at = Path(name) if Path(name).is_dir() else name
        raise ColdstillError(f"{where}: {_without_weights(at)}")
    files = [found]
    if found.name.endswith(INDEX_END):
        _expect_fetched(found, where)
        there = {shard: _file(name, shard, revision) for shard in shards(found)}
        gone = [shard for shard, path in there.items() if path is None]
        if gone:
            raise ColdstillError(
                f"{where}: {found} names {len(there)} weight files, {len(gone)} of them not there "
                f"({', '.join(gone[:3])}); fetch or save the model again"
            )
        files = [path for path in there.values() if path is not None]
    for path in files:
        _expect_fetched(path, where)
    return files


def tensor_shapes(files: Iterable[Path], where: str) -> Shapes:
    """Every tensor of these files, by its header alone where the format has one.

    Raises
        ColdstillError: a damaged file, or a tensor that stands in two of them
    """
    shapes: Shapes = {}
    for path in files:
        for key, shape, _ in _tensors(path, where):
            if key in shapes:
                raise ColdstillError(
                    f"{where}: {path}: the tensor {key} stands in another weight file too, so "
                    "it is not known which is meant; fetch or save the model again"
                )
            shapes[key] = shape
    return shapes


def count_parameters(files: Iterable[Path], where: str) -> int:
    """Numbers in these files; tensors that share their memory count once."""
    counted = {
        (path, shared): math.prod(shape)
        for path in files
        for _, shape, shared in _tensors(path, where)
    }
    return sum(counted.values())


def differ(files: Iterable[Path], first: str, second: str) -> bool:
    """Whether two tensors of these files hold other numbers."""
    found: dict[str, torch.Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                there = {first, second}.intersection(tensors.keys())
                found |= {key: tensors.get_tensor(key) for key in there}
        else:
            state = _unpickled(path)
            found |= {key: state[key] for key in (first, second) if key in state}
    return not torch.equal(found[first], found[second])


def _unpickled(path: Path) -> Any:
    # files of the older format are no archives, so they cannot be mapped into memory
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _tensors(path: Path, where: str) -> Iterator[tuple[str, tuple[int, ...], object]]:
    """Name and shape of each tensor, and what is equal for tensors that are one and the same."""
    with asking(
        "torch" if path.suffix == ".bin" else "safetensors",
        f"read {path.name} of {path.parent} (damaged weights)",
        where=where,
        remedy="fetch or save the model again",
    ):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tuple(tensors.get_slice(key).get_shape()), key
            return
        try:
            state = _unpickled(path)
        except pickle.UnpicklingError as error:
            raise ColdstillError(
                f"{where}: {path}: is damaged, or holds more than tensors, and reading that could "
                "run code; fetch it again, or save the model with save_pretrained"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ColdstillError(
            f"{where}: {path}: is not a table of tensors (the state of a training, perhaps); save "
            "the model itself with save_pretrained"
        )
    for key, tensor in state.items():
        yield key, tuple(tensor.shape), (tensor.data_ptr(), tensor.shape)


def _file(name: str, file: str, revision: str) -> Path | None:
    """A file of a model, in its folder or fetched from a hub; None if the model has none."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _expect_fetched(path: Path, where: str) -> None:
    with path.open("rb") as stream:
        pointer = stream.read(len(_POINTER)) == _POINTER
    if pointer:
        raise ColdstillError(
            f"{where}: {path} is a pointer of Git LFS, not the weights; fetch them with "
            f"git lfs pull in {path.parent}"
        )


def _without_weights(at: Path | str) -> str:
    """Why there is nothing to load."""
    told = f"{at} holds no *.safetensors or *.bin weights"
    if not isinstance(at, Path):
        return told
    others = sorted(p.name for end in ("*.safetensors", "*.bin") for p in at.glob(end))
    if not others:
        return told
    return (
        f"{told} that transformers loads ({', '.join(ORDER)}), but {', '.join(others[:3])}; save "
        "the model with save_pretrained"
    )
