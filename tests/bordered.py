"""Small models that compute differently beyond some length, or that depend on their batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
BORDER = 16
"""The length from which on they change."""
_WIDE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_LLAMA = {**_WIDE, "num_key_value_heads": 2, "head_dim": 16}
_WINDOW = {
    **_LLAMA, "sliding_window": BORDER, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8,
    "long_factor": [3.0 + i for i in range(8)], "original_max_position_embeddings": BORDER,
}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
_YARN = _DYNAMIC | {"rope_type": "yarn", "original_max_position_embeddings": BORDER}
_LLAMA4 = {
    **_LLAMA, "intermediate_size_mlp": 64, "num_local_experts": 2, "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"], "pad_token_id": 0,
}  # fmt: skip
_GEMMA3N = {
    **_WINDOW, "intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0],
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4, "num_kv_shared_layers": 0,
}  # fmt: skip

BORDERED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "phi3 longrope": (
        "phi3",
        {**_WIDE, "rope_parameters": _LONGROPE, "original_max_position_embeddings": BORDER,
         "pad_token_id": 0},
    ),
    "llama dynamic": (
        "llama", {**_LLAMA, "max_position_embeddings": BORDER, "rope_parameters": _DYNAMIC}
    ),
    "llama yarn": ("llama", {**_LLAMA, "rope_parameters": _YARN}),
    "gemma3 window": ("gemma3_text", _WINDOW),
    "gpt_oss window": (
        "gpt_oss", {**_WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "gemma3 longrope in half the layers": (
        "gemma3_text",
        {**_WINDOW, "rope_parameters": {"sliding_attention": _PLAIN, "full_attention": _LONGROPE}},
    ),
    "gemma3n": ("gemma3n_text", _GEMMA3N),
    "llama4 chunks": ("llama4_text", {**_LLAMA4, "attention_chunk_size": BORDER}),
    "llama4 queries scaled by place": (
        "llama4_text", {**_LLAMA4, "attn_temperature_tuning": True, "floor_scale": BORDER}
    ),
    "falcon alibi": ("falcon", {**_WIDE, "alibi": True}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "rwkv": ("rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}),
    "mamba": ("mamba", {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
}  # fmt: skip
"""Name of a special trait -> family of transformers and its settings."""


def bordered(name: str) -> Any:
    """A new model of `BORDERED` with fixed weights; it has read nothing yet."""
    family, settings = BORDERED[name]
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0, **settings
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


class ScaledByTheBatch(torch.nn.Module):
    """A model with unknown code, in which all positions depend on the longest text of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bordered("llama")
        self.config, self.generation_config = self.inner.config, self.inner.generation_config
        self.config.original_max_position_embeddings = BORDER
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        scale = 3 if input_ids.shape[1] > BORDER else 1
        own = torch.arange(input_ids.shape[1])[None].expand(input_ids.shape)
        positions = given.pop("position_ids", own)
        return self.inner(input_ids=input_ids, position_ids=positions * scale, **given)

    @property
    def get_output_embeddings(self) -> Any:
        """The accessor that models of transformers have."""
        return self.inner.get_output_embeddings

    @property
    def get_input_embeddings(self) -> Any:
        """The accessor that models of transformers have."""
        return self.inner.get_input_embeddings
