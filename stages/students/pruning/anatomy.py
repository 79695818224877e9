"""A model's sizes, and what others it would have as many parameters as. Loads no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from .families import FAMILIES, Axis, Family

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]
"""Parameters by their full names, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What pruning changes of a model."""

    layers: int
    hidden: int
    """D, width of the residual stream."""
    feed_forward: int
    """F, neurons of a feed-forward layer."""
    heads: int
    """H, query heads of a layer."""
    kv_heads: int
    """G, key-value heads of a layer, each with `H / G` query heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What a model is made of."""

    name: str
    """Its `model_type`."""
    family: Family
    sizes: Sizes
    head_width: int
    shapes: Shapes

    def axes(self, parameter: str) -> tuple[Axis, ...] | None:
        """What the axes of a parameter run over; None if the family's table lacks it."""
        inside = re.fullmatch(rf"{re.escape(self.family.layers)}\.\d+\.(.+)", parameter)
        if inside is not None:
            return self.family.inside.get(inside[1])
        return self.family.outside.get(parameter)

    def parameters(self, sizes: Sizes) -> int:
        """How many parameters it would have with these sizes."""
        first, any_layer = f"{self.family.layers}.0.", f"{self.family.layers}."
        total = 0
        for name, shape in self.shapes.items():
            if name.startswith(first):
                total += sizes.layers * math.prod(self._shape(name, shape, sizes))
            elif not name.startswith(any_layer):
                total += math.prod(self._shape(name, shape, sizes))
        return total

    def resized(self, sizes: Sizes) -> Anatomy:
        """That of the model with these sizes."""
        layer = f"{self.family.layers}.0."
        shapes: Shapes = {}
        for name, shape in self.shapes.items():
            if not name.startswith(f"{self.family.layers}."):
                shapes[name] = self._shape(name, shape, sizes)
            elif name.startswith(layer):
                for number in range(sizes.layers):
                    copied = f"{self.family.layers}.{number}.{name.removeprefix(layer)}"
                    shapes[copied] = self._shape(name, shape, sizes)
        return replace(self, sizes=sizes, shapes=shapes)

    def _shape(self, name: str, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        axes = self.axes(name)
        if axes is None:
            return shape
        return tuple(
            length if axis == "free" else self._length(axis, sizes)
            for axis, length in zip(axes, shape, strict=True)
        )

    def _length(self, axis: Axis, sizes: Sizes) -> int:
        match axis:
            case "hidden":
                return sizes.hidden
            case "feed_forward":
                return sizes.feed_forward
            case "key":
                return sizes.kv_heads * self.head_width
            case "query":
                return sizes.heads * self.head_width
            case _:
                return 3 * sizes.heads * self.head_width

    def settings(self, sizes: Sizes) -> dict[str, int]:
        """The same sizes as its configuration calls them."""
        values = {
            "layers": sizes.layers,
            "hidden": sizes.hidden,
            "feed_forward": sizes.feed_forward,
            "heads": sizes.heads,
            "kv_heads": sizes.kv_heads,
            # most families would take hidden / heads for it
            "head_width": self.head_width,
        }
        return {key: values[name] for name, key in self.family.keys.items()}


def anatomy_of(name: str, heads: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> Anatomy:
    """The anatomy of a model.

    name    its `model_type`
    heads   query heads of a layer, which no tensor tells
    shapes  of its parameters, by their full names, tied ones once

    Raises
        ColdstillError: a family that has no table, or a model that is not built like its family
    """
    family = FAMILIES.get(name)
    if family is None:
        raise ColdstillError(
            f"{where}: cannot prune a {name!r} model (have: {', '.join(FAMILIES)}); students.NAME."
            "layers = { keep = 4 } and the like leave out layers of any family"
        )
    if not isinstance(heads, int) or heads < 1:
        raise _unlike(where, name, "its configuration has no number of heads")
    found = re.compile(rf"{re.escape(family.layers)}\.(\d+)\.")
    layers = {int(match[1]) for key in shapes if (match := found.match(key))}

    def length(parameter: str, wanted: Axis) -> int:
        """How long the axis of that kind is."""
        full = parameter if parameter in family.outside else f"{family.layers}.0.{parameter}"
        axes = family.outside.get(parameter) or family.inside[parameter]
        if full not in shapes or len(shapes[full]) != len(axes):
            raise _unlike(where, name, f"it has no {full} of {len(axes)} axes")
        return shapes[full][axes.index(wanted)]

    queries = length(f"{family.attention_out}.weight", "query")
    if queries % heads:
        raise _unlike(where, name, f"its {queries} queries are not shared out among {heads} heads")
    width = queries // heads
    keys = "self_attn.k_proj.weight"
    anatomy = Anatomy(
        name=name,
        family=family,
        sizes=Sizes(
            layers=len(layers),
            hidden=length(f"{family.embedding}.weight", "hidden"),
            feed_forward=length(f"{family.feed_forward_out}.weight", "feed_forward"),
            heads=heads,
            kv_heads=length(keys, "key") // width if keys in family.inside else heads,
        ),
        head_width=width,
        shapes=dict(shapes),
    )
    _expect_known(anatomy, where)
    return anatomy


def _expect_known(anatomy: Anatomy, where: str) -> None:
    """Refuse what the table does not foresee: it would be cut in a wrong place, or not at all."""
    for name, shape in anatomy.shapes.items():
        axes = anatomy.axes(name)
        if axes is None:
            raise _unlike(where, anatomy.name, f"nothing is known of its {name}")
        expected = None if len(axes) != len(shape) else anatomy._shape(name, shape, anatomy.sizes)
        if expected != shape:
            raise _unlike(where, anatomy.name, f"its {name} is {shape}, expected {expected}")


def _unlike(where: str, name: str, reason: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: cannot prune this {name!r} model: {reason}; start from 'layers' or 'model'"
    )
