"""What llama.cpp calls the parts of each family, and how it wants them laid out.

llama.cpp has a program for each architecture, in which much is fixed that a configuration of
transformers may choose. What does not fit is refused by name; what can be put into the weights is
(another scale of the attention, scaled rotary frequencies).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of model of transformers."""

    architecture: str
    """llama.cpp's name for it."""
    activation: str
    """The only one it computes there."""
    facts: Callable[[Any], Facts]
    """Its settings, by keys that follow `architecture.`, from the configuration."""
    change: Callable[[str, NDArray[Any], Any], NDArray[Any]]
    """A tensor as llama.cpp wants it, from its name in transformers, itself and the settings."""
    may_untie: bool = True
    """Whether its head may be another matrix than its embedding;"""
    may_tie: bool = True
    """whether the file may leave a head that is the embedding out."""


def family_of(model: Any) -> Family:
    """The entry of a model that `refusal` has nothing against."""
    return FAMILIES[model.config.model_type]


def refusal(model: Any) -> str | None:
    """Why llama.cpp cannot run this model, or None."""
    config, kind = model.config, model.config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"a {kind!r} model is none of the families known here ({', '.join(FAMILIES)})"
    activation = next(
        getattr(config, name)
        for name in ("hidden_activation", "activation_function", "hidden_act")
        if getattr(config, name, None) is not None
    )
    if activation != family.activation:
        return (
            f"a {kind!r} model with the activation {activation!r}, where llama.cpp computes "
            f"{family.activation!r}"
        )
    if not family.may_untie and not config.tie_word_embeddings:
        return f"a {kind!r} model with a head of its own, where llama.cpp takes the embedding"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return f"a {kind!r} model that scales attention by layer, which llama.cpp does not"
    known = ("default", "linear", "llama3") if family.architecture == "llama" else ("default",)
    for rope in rotary(config):
        if rope.get("rope_type", "default") not in known:
            return f"a {kind!r} model with rotary embeddings of the kind {rope['rope_type']!r}"
        part = rope.get("partial_rotary_factor") or 1.0
        if part != 1.0 and kind != "gpt_neox":
            return f"a {kind!r} model that rotates only a part of each head"
    return None


def rotary(config: Any) -> list[dict[str, Any]]:
    """The parameters of its rotary embeddings, those of sliding layers last; none without."""
    found = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in found:
        return [found["full_attention"], found.get("sliding_attention", {})]
    return [found] if found else []


def window(config: Any) -> int | None:
    """How far back its sliding layers look; None if it has none."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size is not None and slides else None


def _sizes(config: Any) -> Facts:
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


def _rms(config: Any) -> Facts:
    sizes = _sizes(config)
    return {
        **sizes,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": sizes["attention.key_length"],
        "rope.freq_base": float(rotary(config)[0]["rope_theta"]),
    }


def _without_window(config: Any) -> Facts:
    # no sliding windows there: within one, every layer sees all that it would see here
    facts = _rms(config)
    facts["context_length"] = min(facts["context_length"], window(config) or (1 << 30))
    return facts


def _gemma2(config: Any) -> Facts:
    return _with_window(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 0.0),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }


def _gemma3(config: Any) -> Facts:
    facts = _with_window(config)
    if config.final_logit_softcapping:
        facts["final_logit_softcapping"] = float(config.final_logit_softcapping)
    facts["rope.freq_base_swa"] = float(rotary(config)[-1]["rope_theta"])
    return facts


def _with_window(config: Any) -> Facts:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    return _rms(config) | {
        "attention.sliding_window": window(config) or config.max_position_embeddings,
        "attention.sliding_window_pattern": slides,
    }


def _gpt2(config: Any) -> Facts:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _gpt_neox(config: Any) -> Facts:
    sizes, rope = _sizes(config), rotary(config)[0]
    part = rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    return sizes | {
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "rope.dimension_count": int(sizes["attention.key_length"] * part),
        "rope.freq_base": float(rope["rope_theta"]),
        "use_parallel_residual": bool(config.use_parallel_residual),
    }


def _as_it_is(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    return tensor


def _neighbours(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """transformers turns entry i of a head together with entry i + D / 2, llama.cpp's `llama` turns
    neighbours: the rows of queries and keys are put side by side."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)


def _whole_norms(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """Gemma's norms multiply by one more than their weight, and its scale of the attention is a
    setting, which llama.cpp takes from the size of a head: the rest goes into the queries."""
    if name.endswith("norm.weight"):
        tensor = tensor + 1.0
    last = "q_norm" if config.model_type == "gemma3_text" else "q_proj"
    if name.split(".")[-2] == last:
        tensor = tensor * _query_factor(config)
    return tensor


def _query_factor(config: Any) -> float:
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if wanted is None:
        return 1.0
    # llama.cpp takes models of so many layers for the largest of their kind
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    taken = config.head_dim
    if config.num_hidden_layers == largest:
        taken = config.hidden_size // config.num_attention_heads
    return math.sqrt(taken / wanted)


def _turned(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """GPT-2 keeps its matrices the other way round."""
    is_matrix = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and tensor.ndim == 2
    return tensor.T if is_matrix else tensor


def _together(name: str, tensor: NDArray[Any], config: Any) -> NDArray[Any]:
    """GPT-NeoX keeps query, key and value of each head together, llama.cpp all queries, all keys,
    all values."""
    if "query_key_value" not in name:
        return tensor
    by_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
    return by_head.swapaxes(0, 1).reshape(tensor.shape)


_LLAMA = Family(architecture="llama", activation="silu", facts=_without_window, change=_neighbours)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(
        architecture="qwen2", activation="silu", facts=_without_window, change=_as_it_is
    ),
    "qwen3": Family(
        architecture="qwen3", activation="silu", facts=_without_window, change=_as_it_is
    ),
    "gemma": Family(
        architecture="gemma",
        activation="gelu_pytorch_tanh",
        facts=_rms,
        change=_whole_norms,
        may_untie=False,
    ),
    "gemma2": Family(
        architecture="gemma2",
        activation="gelu_pytorch_tanh",
        facts=_gemma2,
        change=_whole_norms,
        may_untie=False,
    ),
    "gemma3_text": Family(
        architecture="gemma3", activation="gelu_pytorch_tanh", facts=_gemma3, change=_whole_norms
    ),
    "gpt2": Family(architecture="gpt2", activation="gelu_new", facts=_gpt2, change=_turned),
    "gpt_neox": Family(
        architecture="gptneox",
        activation="gelu",
        facts=_gpt_neox,
        change=_together,
        may_tie=False,
    ),
}
