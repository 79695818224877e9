"""Reads a GGUF file with transformers, to check it on machines without llama.cpp.

transformers dequantises every tensor and restores its own layout, so a tensor under a wrong name or
in a wrong layout changes the logits. Settings come from the student, because transformers ignores
some of the file's. So the check does not cover the file's settings and tokens and llama.cpp's
arithmetic, and the record says so.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig

from ...models.loading import load_gguf
from ..contract import titled
from ..torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from ..contract import LoadedStudent


def read_back(path: Path, student: LoadedStudent) -> TorchRuntime:
    """The model of a file, in fp32.

    Raises
        ColdstillError: transformers cannot read it
    """
    config: Any = copy.deepcopy(student.model.config)
    if student.family == "mistral":  # a Llama with a window that the file's context fits in
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    model = load_gguf(path, config)
    return TorchRuntime(model, f"the GGUF reader of {titled('transformers')}", is_own=False)
