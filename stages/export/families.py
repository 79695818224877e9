"""Model families that a format cannot hold, known by name before a student is trained."""

from __future__ import annotations

from .gguf.architectures import ARCHITECTURES

WITHOUT_PLAIN_CACHE = frozenset(
    {
        "bailing_hybrid", "dory", "falcon_mamba", "jamba", "lara_mini", "lfm3", "mamba",
        "megatron-bert", "minimax", "olmo_hybrid", "openai-gpt", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rembert", "roc_bert",
        "rwkv", "xlstm",
    }
)  # fmt: skip
"""Families whose cache is not one key and one value tensor for each layer, the inputs and outputs
of an ONNX graph. The export itself inspects the model."""

_SAME_AS = {"gpt-sw3": "gpt2"}
"""Names of transformers for models of another family."""


def unable(family: str, formats: tuple[str, ...]) -> list[str]:
    """Those of the formats that cannot hold any student of this family."""
    family = _SAME_AS.get(family, family)
    return [
        name
        for name in formats
        if (name.startswith("gguf") and family not in ARCHITECTURES)
        or (name.startswith("onnx") and family in WITHOUT_PLAIN_CACHE)
    ]
