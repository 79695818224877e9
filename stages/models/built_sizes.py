"""The sizes of a model that was built, measured on its modules, against those that were asked for.

A configuration keeps whatever it is given, and a family may ignore it: so modules are looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError
from .size_names import size_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..config import ArchitectureConfig

_ATTENTION = re.compile(r"attn|attention|norm|conv|mixer|ssm|mamba|rotary|(^|\.)ln_|router|gate$")
"""Parts of a layer that are no feed-forward layer, by their names."""
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
"""What attention modules call the number of their heads."""


def expect_as_asked(
    model: Any, architecture: ArchitectureConfig, known: Sequence[str], where: str
) -> None:
    """Refuse a model that is not as large as the recipe says.

    known  the recipe's keys that the family has settings for

    Raises
        ColdstillError: the first size that differs, and which sizes the family takes
    """
    kind = model.config.model_type
    takes = f"it takes {', '.join(known)}"
    for key, asked, built in _differences(model, architecture, known):
        advice = "set it to that" if built and key != "tied" else f"remove {key}"
        if key == "tied":
            advice = f"set tied = {str(built).lower()}"
            has = "one matrix" if built else "two matrices"
            said = f"has {has} for its input and output embeddings"
        elif built:
            said = f"has {key} = {built} here"
        else:
            said = "has no such size"
        shown = str(asked).lower() if isinstance(asked, bool) else asked
        raise ColdstillError(
            f"{where}: {key} = {shown}: a {kind!r} model {said}; {advice}, or choose another "
            f"family ({takes})"
        )


def _differences(
    model: Any, architecture: ArchitectureConfig, known: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, what was asked for, what was built (None: the family has no such size)."""
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
            if "Attention" in type(module).__name__  # others have heads of another kind
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


def layers_of(model: Any, count: int) -> torch.nn.ModuleList | None:
    """The list of a model's layers: one of that many modules, else the longest."""
    outer: list[tuple[str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other, _ in outer)
        if isinstance(module, torch.nn.ModuleList) and not inside:
            outer.append((name, module))
    lists = [module for _, module in outer]
    return next((one for one in lists if len(one) == count), max(lists, key=len, default=None))


def layer_count_of(model: Any, expected: int) -> int:
    """How many layers a model has; `expected` where it keeps them in no list."""
    layers = layers_of(model, expected)
    return expected if layers is None else len(layers)


def feed_forward_width(model: Any) -> int:
    """The width of the feed-forward layers; the largest where there are several, and of a layer
    whose gate and up are one matrix the width of one. 0 without any."""
    widths = feed_forward_widths(model)
    told = size_in(model.config.get_text_config().to_dict(), "feed_forward")
    return told if widths & {told, 2 * told} else max(widths, default=0)


def feed_forward_widths(model: Any) -> set[int]:
    """Sizes, but for that of the residual stream, of matrices in layers that are no attention."""
    hidden = model.get_input_embeddings().weight.shape[1]
    layers = layers_of(model, getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    found: set[int] = set()
    for name, weight in (model if layers is None else layers).named_parameters():
        if weight.ndim < 2 or _ATTENTION.search(name.rpartition(".")[0]):
            continue
        sizes = weight.shape[-2:]
        if hidden in sizes:
            found.add(sizes[0] if sizes[1] == hidden else sizes[1])
    return found


def _kv_heads(model: Any) -> int | None:
    """How many key-value heads there are, from the widths of keys and queries; None if there is no
    telling."""
    for module in model.modules():
        query, key = (getattr(module, name, None) for name in ("q_proj", "k_proj"))
        heads = next((getattr(module, n) for n in _HEADS if hasattr(module, n)), None)
        heads = heads or getattr(model.config.get_text_config(), "num_attention_heads", None)
        if isinstance(query, torch.nn.Linear) and isinstance(key, torch.nn.Linear) and heads:
            return int(key.out_features * heads // query.out_features)
    return None
