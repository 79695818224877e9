"""What a store records of its teacher, read from its files without loading it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from ...data.errors import ColdstillError
from ...data.fingerprint import files_sha256, json_sha256
from ...data.manifest import TeacherIdentity
from ..libraries import first_line
from .device import DTYPES
from .loading import expect_present, searched


def teacher_identity(name: str, where: str, *, dtype: str, revision: str) -> TeacherIdentity:
    """What a store records of its teacher: everything that decides what it says. Reads its files,
    but does not load it.

    Raises
        ColdstillError: there is no such model
    """
    expect_present(name, where)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise ColdstillError(
            f"{where}: cannot load {searched(name)}: {first_line(error)}"
        ) from error
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ColdstillError(f"{where}: {folder} holds no *.safetensors or *.bin weights")
    try:
        parameters = sum(_count_parameters(path) for path in weights)
    except Exception as error:  # likewise of its many formats
        raise ColdstillError(
            f"{where}: damaged weights in {folder}: {first_line(error)}; fetch or save them again"
        ) from error
    settings = config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        settings.pop(key, None)
    own = str(getattr(config, "dtype", None) or torch.float32)
    return TeacherIdentity(
        name=folder.name if Path(name).is_dir() else name,
        fingerprint=json_sha256([files_sha256(weights), settings]),
        family=config.model_type,
        dtype=(own if dtype == "auto" else str(DTYPES[dtype])).removeprefix("torch."),
        parameters=parameters,
        bytes=sum(path.stat().st_size for path in weights),
    )


def _count_parameters(path: Path) -> int:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return sum(tensor.numel() for tensor in state.values())
