"""A GGUF file read back into PyTorch by transformers, for where llama.cpp is not installed.

transformers reads such files by its own code: every tensor is dequantised, turned back into its own
layout and put in its place. So a tensor written to a wrong name or laid out wrongly shows in the
logits. The settings are the student's (transformers leaves out some that the file has), so those in
the file, llama.cpp's arithmetic and its tokens are not tried: the export says so.
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

    from ..contract import Source


def read_back(path: Path, source: Source) -> TorchRuntime:
    """The model of a file, in fp32.

    Raises
        ColdstillError: transformers cannot read it
    """
    config: Any = copy.deepcopy(source.model.config)
    if source.family == "mistral":  # a Llama with a window, which the file's context stays within
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    model = load_gguf(path, config)
    return TorchRuntime(model, f"the GGUF reader of {titled('transformers')}", is_own=False)
