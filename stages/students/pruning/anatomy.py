"""The sizes of a model, and its number of parameters with other sizes. Loads no torch."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from .families import FAMILIES, Axis, TensorLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        """Anatomy of the model with these sizes."""
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
        """Length of a parameter's axis of this kind."""
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
