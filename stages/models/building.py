"""Making new models with random weights, as large as a recipe says."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...data.errors import ColdstillError
from ..libraries import asking
from .built_sizes import expect_as_asked
from .size_names import SIZE_NAMES
from .vocabulary import vocabulary_size

if TYPE_CHECKING:
    from ..config import ArchitectureConfig

_REMEDY = "choose other sizes, or another family"
_VOCABULARIES = ("vocab_size_per_layer_input", "unpadded_vocab_size")
"""Further sizes of vocabularies, which must not be larger than the tokenizer's."""
_PARTS = {
    "text_config", "decoder", "decoder_config", "vision_config", "audio_config", "patcher_config",
}  # fmt: skip
"""Configurations of further models inside one: then sizes would have to say of which."""


def expect_sizes(architecture: ArchitectureConfig, where: str) -> None:
    """Refuse sizes of a new model that do not divide, as `build_model` does."""
    if architecture.hidden % architecture.heads:
        raise ColdstillError(
            f"{where}: hidden = {architecture.hidden} is not a multiple of heads = "
            f"{architecture.heads}"
        )
    kv_heads = architecture.kv_heads or architecture.heads
    if architecture.heads % kv_heads:
        raise ColdstillError(
            f"{where}: heads = {architecture.heads} is not a multiple of kv_heads = {kv_heads}"
        )


def build_model(
    architecture: ArchitectureConfig, tokenizer: Any, sequence_length: int, seed: int, where: str
) -> Any:
    """A new model with random weights, as large as `architecture` says.

    The sizes of what was built are measured: a family that ignores one of them is refused.

    Raises
        ColdstillError: unknown family, sizes that do not divide, or that the family does not take
    """
    expect_sizes(architecture, where)
    family = architecture.family
    kind = _config_class(family, where)
    settings = _settings(kind, architecture, tokenizer, sequence_length)
    torch.manual_seed(seed)
    with asking("transformers", f"make a {family!r} model", where=where, remedy=_REMEDY):
        model = AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32)
    expect_as_asked(model, architecture, _sizes(kind), where)
    return model.eval()


def unused_heads(architecture: ArchitectureConfig, where: str) -> str | None:
    """A note where the family has no attention heads, so that `heads` decides nothing."""
    if "heads" in _sizes(_config_class(architecture.family, where)):
        return None
    return (
        f"{where}: heads = {architecture.heads} decides nothing: a {architecture.family!r} model "
        "has no attention heads"
    )


def _config_class(family: str, where: str) -> Any:
    """The configuration of a family that makes causal language models.

    Raises
        ColdstillError: there is no such family, or it is no plain language model
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ColdstillError(
            f"{where}: cannot make a {family!r} model: transformers has no causal language model "
            "of that name; choose another family"
        )
    kind = CONFIG_MAPPING[family]
    parts = getattr(kind, "sub_configs", {})
    if _PARTS.intersection(parts):
        inner = getattr(parts.get("text_config"), "model_type", "")
        usable = inner in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and inner != family
        advice = f"choose family = {inner!r}" if usable else "choose another family"
        raise ColdstillError(
            f"{where}: cannot make a {family!r} model: it is made of several models, of which one "
            f"reads text; {advice}"
        )
    return kind


def _names(kind: Any) -> set[str]:
    """The settings that a configuration declares; whatever else it is given it keeps unread."""
    names: set[str] = {field.name for field in fields(kind)}
    return names | set(kind.attribute_map)


def _sizes(kind: Any) -> list[str]:
    """The keys of a recipe that a family has settings for."""
    known = _names(kind)
    return [key for key, names in SIZE_NAMES.items() if known.intersection(names)]


def _settings(
    kind: Any, architecture: ArchitectureConfig, tokenizer: Any, sequence_length: int
) -> dict[str, Any]:
    """What the configuration is given: every name that the family has for a size."""
    known = _names(kind)
    sizes: dict[str, Any] = {
        "layers": architecture.layers,
        "hidden": architecture.hidden,
        "heads": architecture.heads,
        "kv_heads": architecture.kv_heads or architecture.heads,
        "feed_forward": architecture.feed_forward or -(-architecture.hidden * 8 // (3 * 32)) * 32,
        "context": architecture.context or 4 * sequence_length,
        "tied": architecture.tied,
    }
    none = {field.name for field in fields(kind) if field.default == 0}  # a part that it lacks
    settings = {
        name: sizes[key]
        for key, names in SIZE_NAMES.items()
        for name in names
        if name in known and (name not in none or key == "tied")
    }
    vocabulary = vocabulary_size(tokenizer)
    settings |= {"vocab_size": vocabulary, **_special_tokens(kind, tokenizer)}
    settings |= {name: vocabulary for name in _VOCABULARIES if name in known}
    # some families read in both directions unless they are told
    settings |= {name: True for name in ("is_decoder", "causal") if name in known}
    width = architecture.hidden // architecture.heads
    if "qk_rope_head_dim" not in known:  # there a head has parts with widths of their own
        settings |= {name: width for name in ("head_dim", "kv_channels") if name in known}
    if "rotary_dim" in known:
        settings["rotary_dim"] = width
    if "num_kv_shared_layers" in known:  # the last ones, of more layers than there may be here
        settings["num_kv_shared_layers"] = 0
    return settings | _of_family(architecture, sizes)


def _special_tokens(kind: Any, tokenizer: Any) -> dict[str, int | None]:
    """The tokenizer's, by the names of the configuration; where one is missing and the family
    insists on it, the end of text stands for it."""
    types = {field.name: str(field.type) for field in fields(kind)}
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is None and "None" not in types.get(name, "None"):
            token = tokenizer.eos_token_id or 0
        found[name] = token
    return found


def _of_family(architecture: ArchitectureConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """What single families need so that the sizes are those that were asked for."""
    layers, heads = architecture.layers, architecture.heads
    kv_heads = architecture.kv_heads or heads
    if architecture.family == "falcon":
        grouped = 1 < kv_heads < heads
        return {"multi_query": kv_heads == 1 < heads, "new_decoder_architecture": grouped}
    if architecture.family == "gpt_neo":
        kinds = ["global" if layer % 2 == 0 else "local" for layer in range(layers)]
        return {"attention_types": [[kinds, 1]]}
    if architecture.family == "lfm2":
        return {"block_auto_adjust_ff_dim": False}  # it would make two thirds of the width
    if architecture.family == "gpt_bigcode":
        return {"multi_query": kv_heads == 1 < heads}
    if architecture.family == "lfm2_moe":
        return {"layer_types": ["full_attention"] * layers}  # as of lfm2; it has no default
    if architecture.family == "recurrent_gemma":
        return {"intermediate_size": 2 * sizes["feed_forward"]}  # gate and up together
    return {}
