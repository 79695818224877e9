"""How llama.cpp names and lays out the model families that it supports here.

llama.cpp has code for each architecture and fixes there much of what a configuration of
transformers may choose. A model with another choice is refused with the reason, unless the choice
can be moved into the weights (another scale of attention, scaled rotary frequencies).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Settings = dict[str, Any]
"""Metadata of a GGUF file; keys without the prefix `ARCHITECTURE.`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one family of transformers becomes a GGUF file."""

    name: str
    """llama.cpp's name of the architecture."""
    activation: str
    """The only activation that llama.cpp computes for it."""
    settings: Callable[[Any], Settings]
    """Metadata for a configuration."""
    change: Callable[[str, NDArray[Any], Any], NDArray[Any]]
    """llama.cpp's layout of a tensor, from its transformers name, the tensor and the config."""
    may_untie: bool = True
    """Whether the output head may differ from the embedding."""
    may_tie: bool = True
    """Whether the file may leave out a head that equals the embedding."""


def refusal(model: Any) -> str | None:
    """Why llama.cpp cannot run this model; None if it can."""
    config, family = model.config, model.config.model_type
    architecture = ARCHITECTURES.get(family)
    if architecture is None:
        return f"a {family!r} model is not of a known family ({', '.join(ARCHITECTURES)})"
    activation = next(
        getattr(config, name)
        for name in ("hidden_activation", "activation_function", "hidden_act")
        if getattr(config, name, None) is not None
    )
    if activation != architecture.activation:
        return (
            f"a {family!r} model with the activation {activation!r}; llama.cpp computes "
            f"{architecture.activation!r}"
        )
    if not architecture.may_untie and not config.tie_word_embeddings:
        return f"a {family!r} model with an untied output head; llama.cpp uses the embedding"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return f"a {family!r} model that scales attention by layer; llama.cpp does not"
    known = ("default", "linear", "llama3") if architecture.name == "llama" else ("default",)
    for rope in rotary(config):
        if rope.get("rope_type", "default") not in known:
            return f"a {family!r} model with rotary embeddings of type {rope['rope_type']!r}"
        if (rope.get("partial_rotary_factor") or 1.0) != 1.0 and family != "gpt_neox":
            return f"a {family!r} model that rotates only a part of each head"
    return None


def rotary(config: Any) -> list[dict[str, Any]]:
    """Parameters of the rotary embeddings; those of sliding layers last; empty without any."""
    found = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in found:
        return [found["full_attention"], found.get("sliding_attention", {})]
    return [found] if found else []


def window(config: Any) -> int | None:
    """Sliding window in tokens; None without sliding layers."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size is not None and slides else None


def _sizes(config: Any) -> Settings:
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head,
        "attention.value_length": head,
    }


def _rms(config: Any) -> Settings:
    sizes = _sizes(config)
    return {
        **sizes,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": sizes["attention.key_length"],
        "rope.freq_base": float(rotary(config)[0]["rope_theta"]),
    }


def _without_window(config: Any) -> Settings:
    # llama.cpp has no windows here; within one window, full attention is the same
    settings = _rms(config)
    settings["context_length"] = min(settings["context_length"], window(config) or (1 << 30))
    return settings


def _with_window(config: Any) -> Settings:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    return _rms(config) | {
        "attention.sliding_window": window(config) or config.max_position_embeddings,
        "attention.sliding_window_pattern": slides,
    }


def _gemma2(config: Any) -> Settings:
    return _with_window(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 0.0),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }


def _gemma3(config: Any) -> Settings:
    settings = _with_window(config)
    if config.final_logit_softcapping:
        settings["final_logit_softcapping"] = float(config.final_logit_softcapping)
    settings["rope.freq_base_swa"] = float(rotary(config)[-1]["rope_theta"])
    return settings


def _gpt2(config: Any) -> Settings:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _gpt_neox(config: Any) -> Settings:
    sizes, rope = _sizes(config), rotary(config)[0]
    part = rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    return sizes | {
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "rope.dimension_count": int(sizes["attention.key_length"] * part),
        "rope.freq_base": float(rope["rope_theta"]),
        "use_parallel_residual": bool(config.use_parallel_residual),
    }


def _unchanged(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    return tensor


def _interleaved(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """Interleave the rows of queries and keys.

    transformers rotates element i of a head with element i + D / 2, llama.cpp's `llama` rotates
    neighbours.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)


def _gemma(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """Add 1 to the norms' weights, and move the scale of attention into the queries.

    Gemma multiplies by the weight plus 1. Its scale of attention is a setting, and llama.cpp
    derives it from the head size.
    """
    if name.endswith("norm.weight"):
        tensor = tensor + 1.0
    last = "q_norm" if config.model_type == "gemma3_text" else "q_proj"
    return tensor * _query_factor(config) if name.split(".")[-2] == last else tensor


def _query_factor(config: Any) -> float:
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if wanted is None:
        return 1.0
    # llama.cpp recognises the largest model of each family by its number of layers
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    taken = config.head_dim
    if config.num_hidden_layers == largest:
        taken = config.hidden_size // config.num_attention_heads
    return math.sqrt(taken / wanted)


def _transposed(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """Transpose the matrices of GPT-2, which are stored as [in, out]."""
    is_matrix = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and tensor.ndim == 2
    return tensor.T if is_matrix else tensor


def _split_by_kind(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """Order rows as all queries, all keys, all values. GPT-NeoX orders them by head."""
    if "query_key_value" not in name:
        return tensor
    by_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
    return by_head.swapaxes(0, 1).reshape(tensor.shape)


_LLAMA = Architecture(
    name="llama", activation="silu", settings=_without_window, change=_interleaved
)
_QWEN2, _QWEN3 = (
    Architecture(name=name, activation="silu", settings=_without_window, change=_unchanged)
    for name in ("qwen2", "qwen3")
)
_GELU = "gelu_pytorch_tanh"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": Architecture(
        name="gemma", activation=_GELU, settings=_rms, change=_gemma, may_untie=False
    ),
    "gemma2": Architecture(
        name="gemma2", activation=_GELU, settings=_gemma2, change=_gemma, may_untie=False
    ),
    "gemma3_text": Architecture(name="gemma3", activation=_GELU, settings=_gemma3, change=_gemma),
    "gpt2": Architecture(name="gpt2", activation="gelu_new", settings=_gpt2, change=_transposed),
    "gpt_neox": Architecture(
        name="gptneox",
        activation="gelu",
        settings=_gpt_neox,
        change=_split_by_kind,
        may_tie=False,
    ),
}
"""Supported families by their model type in transformers."""
