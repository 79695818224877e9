"""The sizes of a model, the tensors of each family, and parameter counts with other sizes.

Each family has one layout, which counting, measuring and cutting read. Loads no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ....data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Mapping

Axis = Literal["free", "hidden", "feed_forward", "query", "key", "three", "three_by_head"]
"""Meaning of an axis. `query` and `key`: heads times the width of a head. `three`: all queries, all
keys, all values. `three_by_head`: query, key and value of each head in turn. `free` axes are never
cut."""
Tensors = dict[str, tuple[Axis, ...]]

HIDDEN: Axis = "hidden"
FEED_FORWARD: Axis = "feed_forward"
QUERY: Axis = "query"
KEY: Axis = "key"


def _linear(name: str, out: Axis, into: Axis) -> Tensors:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _transposed(name: str, into: Axis, out: Axis) -> Tensors:
    """GPT-2's linear layer, whose weight is transposed."""
    return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}


def _norm(name: str, axis: Axis = HIDDEN) -> Tensors:
    return {f"{name}.weight": (axis,), f"{name}.bias": (axis,)}


def _table(name: str) -> Tensors:
    return {f"{name}.weight": ("free", HIDDEN)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """The tensors of a family's models, and the names of its sizes."""

    layers: str
    """Full name of the list of layers."""
    outside: Tensors
    """Tensors outside the layers, by full name."""
    inside: Tensors
    """Tensors of a layer, by their name inside the layer."""
    embedding: str
    """Full name of the input embedding."""
    last_norm: str
    """Full name of the norm before the output head."""
    readers: tuple[str, ...]
    """Norms of a layer that read the residual stream."""
    writers: tuple[str, ...] = ()
    """Norms of a layer that write to the residual stream."""
    attention_out: str
    """The linear layer after the attention heads."""
    feed_forward_out: str
    """The linear layer after the feed-forward neurons."""
    keys: Mapping[str, str] = field(
        default_factory=lambda: {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "feed_forward": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_width": "head_dim",
        }
    )
    """Name of each size in the configuration."""
    norm_offset: float = 0.0
    """Number that its norms add to their weights."""
    scaled_embedding: bool = False
    """Whether the model multiplies embeddings by the square root of `hidden`."""
    multiple: bool = False
    """Whether `hidden` must be a multiple of `heads`, even if heads have their own width."""

    @property
    def bound(self) -> bool:
        """Whether `hidden` is heads times their width: no name for that width exists."""
        return "head_width" not in self.keys


_ATTENTION = {
    **_linear("self_attn.q_proj", QUERY, HIDDEN),
    **_linear("self_attn.k_proj", KEY, HIDDEN),
    **_linear("self_attn.v_proj", KEY, HIDDEN),
    **_linear("self_attn.o_proj", HIDDEN, QUERY),
    **_norm("self_attn.q_norm", "free"),
    **_norm("self_attn.k_norm", "free"),
}
_GATED = {
    **_linear("mlp.gate_proj", FEED_FORWARD, HIDDEN),
    **_linear("mlp.up_proj", FEED_FORWARD, HIDDEN),
    **_linear("mlp.down_proj", HIDDEN, FEED_FORWARD),
}
_OUTSIDE = {**_table("model.embed_tokens"), **_table("lm_head"), **_norm("model.norm")}


def _like_llama(
    *,
    readers: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    writers: tuple[str, ...] = (),
    **own: bool | float,
) -> TensorLayout:
    norms: Tensors = {}
    for name in (*readers, *writers):
        norms |= _norm(name)
    return TensorLayout(
        layers="model.layers",
        outside=_OUTSIDE,
        inside={**norms, **_ATTENTION, **_GATED},
        embedding="model.embed_tokens",
        last_norm="model.norm",
        readers=readers,
        writers=writers,
        attention_out="self_attn.o_proj",
        feed_forward_out="mlp.down_proj",
        **own,  # type: ignore[arg-type]
    )


_GEMMA2 = _like_llama(
    readers=("input_layernorm", "pre_feedforward_layernorm"),
    writers=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
    multiple=True,
)
_GPT2 = TensorLayout(
    layers="transformer.h",
    outside={
        **_table("transformer.wte"),
        **_table("transformer.wpe"),
        **_table("lm_head"),
        **_norm("transformer.ln_f"),
    },
    inside={
        **_norm("ln_1"),
        **_norm("ln_2"),
        **_transposed("attn.c_attn", HIDDEN, "three"),
        **_transposed("attn.c_proj", QUERY, HIDDEN),
        **_transposed("mlp.c_fc", HIDDEN, FEED_FORWARD),
        **_transposed("mlp.c_proj", FEED_FORWARD, HIDDEN),
    },
    embedding="transformer.wte",
    last_norm="transformer.ln_f",
    readers=("ln_1", "ln_2"),
    attention_out="attn.c_proj",
    feed_forward_out="mlp.c_proj",
    keys={"layers": "n_layer", "hidden": "n_embd", "feed_forward": "n_inner", "heads": "n_head"},
)
_GPT_NEOX = TensorLayout(
    layers="gpt_neox.layers",
    outside={
        **_table("gpt_neox.embed_in"),
        **_table("lm_head"),
        **_table("embed_out"),  # the head's name in older checkpoints
        **_norm("gpt_neox.final_layer_norm"),
    },
    inside={
        **_norm("input_layernorm"),
        **_norm("post_attention_layernorm"),
        **_linear("attention.query_key_value", "three_by_head", HIDDEN),
        **_linear("attention.dense", HIDDEN, QUERY),
        **_linear("mlp.dense_h_to_4h", FEED_FORWARD, HIDDEN),
        **_linear("mlp.dense_4h_to_h", HIDDEN, FEED_FORWARD),
    },
    embedding="gpt_neox.embed_in",
    last_norm="gpt_neox.final_layer_norm",
    readers=("input_layernorm", "post_attention_layernorm"),
    attention_out="attention.dense",
    feed_forward_out="mlp.dense_4h_to_h",
    keys={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "feed_forward": "intermediate_size",
        "heads": "num_attention_heads",
    },
)

FAMILIES: dict[str, TensorLayout] = {
    "llama": _like_llama(multiple=True),
    "mistral": _like_llama(),
    "qwen2": _like_llama(),
    "qwen3": _like_llama(),
    "gemma": _like_llama(norm_offset=1.0, scaled_embedding=True),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}  # fmt: skip
"""Layouts by `model_type`. One line adds a family that has the layout of another."""


Shapes = dict[str, tuple[int, ...]]
"""Shapes of parameters by full name; tied parameters occur once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that pruning changes."""

    layers: int
    hidden: int
    """D, width of the residual stream."""
    feed_forward: int
    """F, neurons of each feed-forward layer."""
    heads: int
    """H, query heads of each layer."""
    kv_heads: int
    """G, key-value heads of each layer; each serves `H / G` query heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """The parameters of a model and their meaning."""

    name: str
    """The model's `model_type`."""
    layout: TensorLayout
    sizes: Sizes
    head_width: int
    shapes: Shapes

    def axes(self, parameter: str) -> tuple[Axis, ...] | None:
        """Meaning of each axis of a parameter; None if the family's layout lacks it."""
        inside = re.fullmatch(rf"{re.escape(self.layout.layers)}\.\d+\.(.+)", parameter)
        if inside is not None:
            return self.layout.inside.get(inside[1])
        return self.layout.outside.get(parameter)

    def parameters(self, sizes: Sizes) -> int:
        """Number of parameters that the model would have with these sizes."""
        first, any_layer = f"{self.layout.layers}.0.", f"{self.layout.layers}."
        total = 0
        for name, shape in self.shapes.items():
            if name.startswith(first):
                total += sizes.layers * math.prod(self._shape(name, shape, sizes))
            elif not name.startswith(any_layer):
                total += math.prod(self._shape(name, shape, sizes))
        return total

    def resized(self, sizes: Sizes) -> Anatomy:
        layer = f"{self.layout.layers}.0."
        shapes: Shapes = {}
        for name, shape in self.shapes.items():
            if not name.startswith(f"{self.layout.layers}."):
                shapes[name] = self._shape(name, shape, sizes)
            elif name.startswith(layer):
                for number in range(sizes.layers):
                    copied = f"{self.layout.layers}.{number}.{name.removeprefix(layer)}"
                    shapes[copied] = self._shape(name, shape, sizes)
        return replace(self, sizes=sizes, shapes=shapes)

    def _shape(self, name: str, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        axes = self.axes(name)
        if axes is None:
            return shape
        queries = sizes.heads * self.head_width
        lengths: dict[Axis, int] = {
            "hidden": sizes.hidden,
            "feed_forward": sizes.feed_forward,
            "key": sizes.kv_heads * self.head_width,
            "query": queries,
            "three": 3 * queries,
            "three_by_head": 3 * queries,
        }
        return tuple(lengths.get(axis, own) for axis, own in zip(axes, shape, strict=True))

    def settings(self, sizes: Sizes) -> dict[str, int]:
        """The sizes under the names of the model's configuration."""
        # most families would set the width of a head to hidden / heads
        values = asdict(sizes) | {"head_width": self.head_width}
        return {key: values[name] for name, key in self.layout.keys.items()}


def anatomy_of(name: str, heads: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> Anatomy:
    """The anatomy of a model.

    name    its `model_type`
    heads   query heads of a layer, which no shape shows
    shapes  shapes of its parameters

    Raises
        ColdstillError: a family without a layout, or a model that differs from its family's layout
    """
    layout = FAMILIES.get(name)
    if layout is None:
        raise ColdstillError(
            f"{where}: cannot prune a {name!r} model (have: {', '.join(FAMILIES)}); students.NAME."
            "layers, such as { keep = 4 }, removes layers of any family"
        )
    if not isinstance(heads, int) or heads < 1:
        raise _unlike(where, name, "its configuration has no number of heads")
    found = re.compile(rf"{re.escape(layout.layers)}\.(\d+)\.")
    layers = {int(match[1]) for key in shapes if (match := found.match(key))}

    def length(parameter: str, wanted: Axis) -> int:
        full = parameter if parameter in layout.outside else f"{layout.layers}.0.{parameter}"
        axes = layout.outside.get(parameter) or layout.inside[parameter]
        if full not in shapes or len(shapes[full]) != len(axes):
            raise _unlike(where, name, f"it has no {full} of {len(axes)} axes")
        return shapes[full][axes.index(wanted)]

    queries = length(f"{layout.attention_out}.weight", "query")
    if queries % heads:
        raise _unlike(where, name, f"its {queries} queries are not divisible by its {heads} heads")
    width = queries // heads
    keys = "self_attn.k_proj.weight"
    anatomy = Anatomy(
        name=name,
        layout=layout,
        sizes=Sizes(
            layers=len(layers),
            hidden=length(f"{layout.embedding}.weight", "hidden"),
            feed_forward=length(f"{layout.feed_forward_out}.weight", "feed_forward"),
            heads=heads,
            kv_heads=length(keys, "key") // width if keys in layout.inside else heads,
        ),
        head_width=width,
        shapes=dict(shapes),
    )
    _expect_known(anatomy, where)
    return anatomy


def _expect_known(anatomy: Anatomy, where: str) -> None:
    """Refuse parameters that the layout does not describe: they would be cut wrongly or not at
    all."""
    for name, shape in anatomy.shapes.items():
        axes = anatomy.axes(name)
        if axes is None:
            raise _unlike(where, anatomy.name, f"its parameter {name} is unknown")
        expected = None if len(axes) != len(shape) else anatomy._shape(name, shape, anatomy.sizes)
        if expected != shape:
            raise _unlike(where, anatomy.name, f"its {name} is {shape}, expected {expected}")


def _unlike(where: str, name: str, reason: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: cannot prune this {name!r} model: {reason}; start from 'layers' or 'model'"
    )
