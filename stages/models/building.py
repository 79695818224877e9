"""Building new models with random weights in the sizes that a recipe asks for.

A configuration keeps any setting that it is given, and a family may ignore it. So the sizes of the
built modules are measured.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...data.errors import ColdstillError
from ..libraries import asking
from .model_files import SIZE_NAMES, size_in
from .vocabulary import vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..config import ArchitectureConfig

_REMEDY = "choose other sizes, or another family"
_VOCABULARIES = ("vocab_size_per_layer_input", "unpadded_vocab_size")
"""Further vocabulary sizes, which must not exceed the tokenizer's."""
_PARTS = {
    "text_config", "decoder", "decoder_config", "vision_config", "audio_config", "patcher_config",
}  # fmt: skip
"""Settings that hold the configuration of a second model, so that sizes would be ambiguous."""
_NOT_FEED_FORWARD = re.compile(
    r"attn|attention|norm|conv|mixer|ssm|mamba|rotary|(^|\.)ln_|router|gate$"
)
"""Names of those parts of a layer that are not its feed-forward block."""
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
"""Attributes of attention modules that hold the number of heads."""


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
    """A new model with random fp32 weights, in evaluation mode.

    Raises
        ColdstillError: the family is unknown, sizes do not divide, or the family ignores a size
    """
    expect_sizes(architecture, where)
    family = architecture.family
    kind = _config_class(family, where)
    settings = _settings(kind, architecture, tokenizer, sequence_length)
    torch.manual_seed(seed)
    with asking("transformers", f"make a {family!r} model", where=where, remedy=_REMEDY):
        model = AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32)
    _expect_built(model, architecture, _sizes(kind), where)
    return model.eval()


def unused_heads(architecture: ArchitectureConfig, where: str) -> str | None:
    """A note if the family has no attention heads, so that `heads` has no effect."""
    if "heads" in _sizes(_config_class(architecture.family, where)):
        return None
    return (
        f"{where}: heads = {architecture.heads} has no effect: a {architecture.family!r} model "
        "has no attention heads"
    )


def layer_count_of(model: Any, expected: int) -> int:
    """Number of layers of a model; `expected` if it keeps them in no list."""
    layers = _layers(model, expected)
    return expected if layers is None else len(layers)


def feed_forward_width(model: Any) -> int:
    """Width of the feed-forward blocks: the largest if there are several, 0 if there are none.

    If gate and up are one matrix, the width of one of them counts.
    """
    widths = feed_forward_widths(model)
    configured = size_in(model.config.get_text_config().to_dict(), "feed_forward")
    return configured if widths & {configured, 2 * configured} else max(widths, default=0)


def feed_forward_widths(model: Any) -> set[int]:
    """Inner sizes of the layers' matrices that are not part of attention."""
    hidden = model.get_input_embeddings().weight.shape[1]
    layers = _layers(model, getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    found: set[int] = set()
    for name, weight in (model if layers is None else layers).named_parameters():
        if weight.ndim < 2 or _NOT_FEED_FORWARD.search(name.rpartition(".")[0]):
            continue
        sizes = weight.shape[-2:]
        if hidden in sizes:
            found.add(sizes[0] if sizes[1] == hidden else sizes[1])
    return found


def _config_class(family: str, where: str) -> Any:
    """The configuration class of a family of causal language models."""
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
            f"{where}: cannot make a {family!r} model: it is made of several models, and only one "
            f"of them reads text; {advice}"
        )
    return kind


def _names(kind: Any) -> set[str]:
    """Settings that a configuration class declares; it keeps other settings without using them."""
    return {field.name for field in fields(kind)} | set(kind.attribute_map)


def _sizes(kind: Any) -> list[str]:
    """Keys of a recipe for which a family has a setting."""
    known = _names(kind)
    return [key for key, names in SIZE_NAMES.items() if known.intersection(names)]


def _settings(
    kind: Any, architecture: ArchitectureConfig, tokenizer: Any, sequence_length: int
) -> dict[str, Any]:
    """Arguments of the configuration class: each size under every name that the family has."""
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
    absent = {field.name for field in fields(kind) if field.default == 0}  # parts not in the family
    settings = {
        name: sizes[key]
        for key, names in SIZE_NAMES.items()
        for name in names
        if name in known and (name not in absent or key == "tied")
    }
    vocabulary = vocabulary_size(tokenizer)
    settings |= {"vocab_size": vocabulary, **_special_tokens(kind, tokenizer)}
    settings |= {name: vocabulary for name in _VOCABULARIES if name in known}
    # some families attend in both directions by default
    settings |= {name: True for name in ("is_decoder", "causal") if name in known}
    width = architecture.hidden // architecture.heads
    if "qk_rope_head_dim" not in known:  # such heads have parts of different widths
        settings |= {name: width for name in ("head_dim", "kv_channels") if name in known}
    if "rotary_dim" in known:
        settings["rotary_dim"] = width
    if "num_kv_shared_layers" in known:  # the default may exceed the number of layers
        settings["num_kv_shared_layers"] = 0
    return settings | _of_family(architecture, sizes)


def _special_tokens(kind: Any, tokenizer: Any) -> dict[str, int | None]:
    """The tokenizer's special tokens by the names of the configuration.

    If the family requires a token that the tokenizer lacks, the end of text is used.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is None and "None" not in types.get(name, "None"):
            token = tokenizer.eos_token_id or 0
        found[name] = token
    return found


def _of_family(architecture: ArchitectureConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """Settings that single families need so that their sizes are the requested ones."""
    layers, heads = architecture.layers, architecture.heads
    kv_heads = architecture.kv_heads or heads
    match architecture.family:
        case "falcon":
            grouped = 1 < kv_heads < heads
            return {"multi_query": kv_heads == 1 < heads, "new_decoder_architecture": grouped}
        case "gpt_neo":
            kinds = ["global" if layer % 2 == 0 else "local" for layer in range(layers)]
            return {"attention_types": [[kinds, 1]]}
        case "lfm2":
            return {"block_auto_adjust_ff_dim": False}  # it would use two thirds of the width
        case "gpt_bigcode":
            return {"multi_query": kv_heads == 1 < heads}
        case "lfm2_moe":
            return {"layer_types": ["full_attention"] * layers}  # has no default
        case "recurrent_gemma":
            return {"intermediate_size": 2 * sizes["feed_forward"]}  # gate and up together
    return {}


def _expect_built(
    model: Any, architecture: ArchitectureConfig, known: Sequence[str], where: str
) -> None:
    """Refuse a model with other sizes than the recipe; `known` are the family's keys."""
    kind = model.config.model_type
    for key, asked, built in _differences(model, architecture, known):
        if key == "tied":
            advice = f"set tied = {str(built).lower()}"
            matrices = "one matrix" if built else "two matrices"
            found = f"has {matrices} for its input and output embeddings"
        elif built:
            advice, found = "set it to that", f"has {key} = {built} here"
        else:
            advice, found = f"remove {key}", "has no such size"
        shown = str(asked).lower() if isinstance(asked, bool) else asked
        raise ColdstillError(
            f"{where}: {key} = {shown}: a {kind!r} model {found}; {advice}, or choose another "
            f"family (it takes {', '.join(known)})"
        )


def _differences(
    model: Any, architecture: ArchitectureConfig, known: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, requested value and built value (None: no such size) of each difference."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if embedding.weight.shape[1] != architecture.hidden:
        yield "hidden", architecture.hidden, embedding.weight.shape[1]
    count = layer_count_of(model, architecture.layers)
    if count != architecture.layers:
        yield "layers", architecture.layers, count
    if "heads" in known:
        counts = {
            getattr(module, name)
            for module in model.modules()
            if "Attention" in type(module).__name__  # other modules have heads of another kind
            for name in _HEADS
            if isinstance(getattr(module, name, None), int)
        }
        if counts and architecture.heads not in counts:
            yield "heads", architecture.heads, max(counts)
    if architecture.kv_heads not in (None, architecture.heads):
        built = _kv_heads(model) if "kv_heads" in known else architecture.heads
        if built not in (None, architecture.kv_heads):
            yield "kv_heads", architecture.kv_heads, built
    wanted = architecture.feed_forward
    if wanted is not None:
        widths = feed_forward_widths(model)
        # gate and up may be one matrix
        fitting = {wanted, 2 * wanted} if "feed_forward" in known else {wanted}
        if not widths & fitting:
            yield "feed_forward", wanted, max(widths, default=None)
    if architecture.context is not None and "context" not in known:
        yield "context", architecture.context, None
    if head is not None and head.weight.ndim == embedding.weight.ndim:
        tied = head.weight is embedding.weight
        if tied != architecture.tied:
            yield "tied", architecture.tied, tied


def _layers(model: Any, count: int) -> torch.nn.ModuleList | None:
    """The list of the model's layers: the outer list of `count` modules, otherwise the longest."""
    outer: list[tuple[str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other, _ in outer)
        if isinstance(module, torch.nn.ModuleList) and not inside:
            outer.append((name, module))
    lists = [module for _, module in outer]
    return next((one for one in lists if len(one) == count), max(lists, key=len, default=None))


def _kv_heads(model: Any) -> int | None:
    """Number of key-value heads by the widths of keys and queries; None if it is unknown."""
    for module in model.modules():
        query, key = (getattr(module, name, None) for name in ("q_proj", "k_proj"))
        heads = next((getattr(module, n) for n in _HEADS if hasattr(module, n)), None)
        heads = heads or getattr(model.config.get_text_config(), "num_attention_heads", None)
        if isinstance(query, torch.nn.Linear) and isinstance(key, torch.nn.Linear) and heads:
            return int(key.out_features * heads // query.out_features)
    return None
