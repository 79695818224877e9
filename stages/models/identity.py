"""The identity of a teacher that a store records, computed from its files without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING

from ...data.files import files_sha256, json_sha256, read_json
from ...data.store.manifest import TeacherIdentity
from .checkpoint import count_parameters, expect_no_adapter, weight_files
from .device import DTYPES
from .loading import load_config, raw_config

if TYPE_CHECKING:
    from collections.abc import Mapping

_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Settings that do not change a model's output, or that are recorded separately."""


def teacher_identity(
    name: str, where: str, *, dtype: str, revision: str, own_code: bool = False
) -> TeacherIdentity:
    """Name, size and a fingerprint of everything that decides a teacher's output.

    Reads the files of the model, but neither loads it nor runs code that it brings.

    own_code  whether that code will run later (`trust_remote_code` of the recipe)

    Raises
        ColdstillError: the model is missing, or its weights are damaged
    """
    raw = raw_config(name, where, revision)
    family = str(raw.get("model_type"))
    native = family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__.startswith(
        "transformers."
    )
    # loading the configuration reports a folder that holds no model
    readable = native or not raw.get("auto_map")
    config = load_config(name, where, revision) if readable else None
    settings = raw if config is None else config.to_diff_dict()
    if Path(name).is_dir():
        expect_no_adapter(Path(name), where)
    files = weight_files(name, where, revision, raw.get("transformers_weights"))
    code = []
    if raw.get("auto_map") and (own_code or not readable):
        code = sorted(files[0].parent.glob("*.py"))
    settings = {key: value for key, value in settings.items() if key not in _NOT_OF_THE_MODEL}
    own = raw.get("dtype") or raw.get("torch_dtype") if config is None else config.dtype
    kept = str(own or torch.float32) if dtype == "auto" else str(DTYPES[dtype])
    return TeacherIdentity(
        name=Path(name).name if Path(name).is_dir() else name,
        fingerprint=json_sha256([files_sha256([*files, *code]), settings]),
        family=family if config is None else config.model_type,
        dtype=kept.removeprefix("torch."),
        parameters=count_parameters(files, where),
        bytes=sum(path.stat().st_size for path in files),
        trust_remote_code=own_code and _brings_code(files[0].parent, raw),
    )


def _brings_code(folder: Path, config: Mapping[str, Any]) -> bool:
    if config.get("auto_map"):
        return True
    of_tokenizer = folder / "tokenizer_config.json"
    return of_tokenizer.is_file() and bool(read_json(of_tokenizer).get("auto_map"))
