"""Which families cannot be written in which formats, known by name: before a student is trained."""

from __future__ import annotations

from .gguf.families import FAMILIES as GGUF_FAMILIES

WITHOUT_PLAIN_CACHE = frozenset(
    {
        "bailing_hybrid", "dory", "falcon_mamba", "jamba", "lara_mini", "lfm3", "mamba",
        "megatron-bert", "minimax", "olmo_hybrid", "openai-gpt", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rembert", "roc_bert",
        "rwkv", "xlstm",
    }
)  # fmt: skip
"""Families that keep something else than keys and values of every layer, which is what an ONNX
graph takes in and gives out. A model is always asked itself when it is exported."""

_SAME_AS = {"gpt-sw3": "gpt2"}
"""Names that transformers has for the models of another family."""


def unable(family: str, formats: tuple[str, ...]) -> list[str]:
    """Those of the formats that no student of this family can be written in."""
    family = _SAME_AS.get(family, family)
    return [
        name
        for name in formats
        if (name.startswith("gguf") and family not in GGUF_FAMILIES)
        or (name.startswith("onnx") and family in WITHOUT_PLAIN_CACHE)
    ]
