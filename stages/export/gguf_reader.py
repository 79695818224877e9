"""A GGUF file read back into PyTorch by transformers, for where llama.cpp is not installed.

transformers reads such files by its own code: every tensor is dequantised, turned back into its own
layout and put in its place. So a tensor written to a wrong name or laid out wrongly shows in the
logits. The settings are the student's (transformers leaves out some that the file has), so those in
the file, llama.cpp's arithmetic and its tokens are not tried: the export says so.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..libraries import asking
from .contract import titled
from .torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from .contract import Source


def read_back(path: Path, source: Source) -> TorchRuntime:
    """The model of a file, in fp32.

    Raises
        ColdstillError: transformers cannot read it
    """
    config: Any = copy.deepcopy(source.model.config)
    if source.family == "mistral":  # a Llama with a window, which the file's context stays within
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    # a progress bar is drawn there, whatever transformers was told
    with (
        asking("transformers", "read it", where=path.name, remedy="take --to hf"),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    return TorchRuntime(model.eval(), f"the GGUF reader of {titled('transformers')}", is_own=False)
