"""Finding the weight files of a checkpoint as transformers does, and reading their headers."""

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
from .model_files import INDEX_END, ORDER, shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""
_POINTER = b"version https://git-lfs"
_ADAPTER = "adapter_config.json"


def expect_no_adapter(folder: Path, where: str) -> None:
    """Check that a folder holds no adapter.

    transformers would load the adapter's base model from elsewhere, or add the adapter to the
    weights beside it.
    """
    if not (folder / _ADAPTER).is_file():
        return
    settings = read_json(folder / _ADAPTER)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if any((folder / name).is_file() for name in ORDER):
        raise ColdstillError(
            f"{where}: {folder} holds an adapter ({_ADAPTER}) beside complete weights, and "
            f"transformers would add it to them; merge it into the weights, or move {_ADAPTER} "
            "away to use them without it"
        )
    raise ColdstillError(
        f"{where}: {folder} holds an adapter of {base!r} and no model; merge the adapter into its "
        "base model (peft: merge_and_unload), save that with its tokenizer, and use that folder"
    )


def weight_files(name: str, where: str, revision: str = "main", named: Any = None) -> list[Path]:
    """The files from which transformers loads the weights of a model.

    name   a folder, or a hub name whose files are downloaded if needed
    named  `transformers_weights` of the configuration: a file to load instead of the usual ones

    Raises
        ColdstillError: there are no weights, an index lists a missing file, or a file is only a
            Git LFS pointer
    """
    candidates = (str(named),) if named else ORDER
    with asking("huggingface_hub", f"find the weights of {name}", where=where):
        found = next(filter(None, (_file(name, each, revision) for each in candidates)), None)
    if found is None:
        raise ColdstillError(f"{where}: {_no_weights(name)}")
    files = [found]
    if found.name.endswith(INDEX_END):
        _expect_fetched(found, where)
        there = {shard: _file(name, shard, revision) for shard in shards(found)}
        gone = [shard for shard, path in there.items() if path is None]
        if gone:
            raise ColdstillError(
                f"{where}: {found} lists {len(there)} weight files, {len(gone)} of them missing "
                f"({', '.join(gone[:3])}); fetch or save the model again"
            )
        files = [path for path in there.values() if path is not None]
    for path in files:
        _expect_fetched(path, where)
    return files


def tensor_shapes(files: Iterable[Path], where: str) -> Shapes:
    """Shapes of all tensors in these files, read from the headers if the format has headers.

    Raises
        ColdstillError: a file is damaged, or two files hold the same tensor
    """
    shapes: Shapes = {}
    for path in files:
        for key, shape, _ in _tensors(path, where):
            if key in shapes:
                raise ColdstillError(
                    f"{where}: {path}: another weight file holds the tensor {key} too, so it is "
                    "unknown which one to load; fetch or save the model again"
                )
            shapes[key] = shape
    return shapes


def count_parameters(files: Iterable[Path], where: str) -> int:
    """Number of parameters in these files; tensors that share memory count once."""
    counted = {
        (path, shared): math.prod(shape)
        for path in files
        for _, shape, shared in _tensors(path, where)
    }
    return sum(counted.values())


def differ(files: Iterable[Path], first: str, second: str) -> bool:
    """Whether two tensors of these files hold different numbers."""
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
    # files of the older format are not archives, so they cannot be memory-mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _tensors(path: Path, where: str) -> Iterator[tuple[str, tuple[int, ...], object]]:
    """Name, shape and an identity of each tensor; tensors that share memory have one identity."""
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
                f"{where}: {path}: is damaged, or holds objects other than tensors, which could "
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
    """The path of a model's file, downloaded if the model is on a hub; None if it has none."""
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


def _no_weights(name: str) -> str:
    """Why a model has no weights to load."""
    fault = f"{name} holds no *.safetensors or *.bin weights"
    others = sorted(p.name for end in ("*.safetensors", "*.bin") for p in Path(name).glob(end))
    if not others:
        return fault
    return (
        f"{fault} that transformers loads ({', '.join(ORDER)}), but {', '.join(others[:3])}; save "
        "the model with save_pretrained"
    )
