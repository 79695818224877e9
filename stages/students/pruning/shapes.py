"""From what a recipe asks for to the sizes a model will have. Loads no torch.

With a number of parameters the sizes that are not given are chosen. Width goes before depth, and
heads stay, as in the models that Minitron published (Muralidharan et al., arXiv 2407.14679 and
2408.11796): the residual stream and the feed-forward layers shrink in the same proportion, until a
quarter of them is left. Then layers go, until half of them is left; then widths again to a quarter
of that, and so on. What their steps leave of the budget goes to the feed-forward layers, unless the
steps of the residual stream are so wide that these would then be out of proportion: that stops
where a twentieth of the budget is left.

Held-out loss of the demo's teacher of three layers (4.891), cut and trained for 200 steps: with a
half of the parameters 4.907 on three layers and 4.927 on two, with a quarter 4.921, 4.934 and, on
one layer, 4.988. Of four heads two cost 0.7 before training, as much as 100 of 256 channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .anatomy import Anatomy, Sizes
    from .config import PruneConfig

_TURNS = range(1, 5)
"""Each takes three quarters of the widths, then half of the layers."""
_STEP = 64
"""Chosen widths are multiples of this, which suits matrix units, or of a smaller power of two:
about a 16th of what a turn begins with."""
_LEFT = 0.05
"""What may be left of a budget, as a share of it,"""
_APART = 1 / 16
"""and how far apart the shares of both widths may be, before more is left for their sake."""
_USED = 0.9
"""Less of a budget is worth a line."""
_NAMES = {"hidden": "channels", "feed_forward": "neurons", "kv_heads": "key-value heads"}


def target_sizes(anatomy: Anatomy, config: PruneConfig, teacher: int, where: str) -> Sizes:
    """The sizes that a model is cut to.

    teacher  parameters of the model that shares are of
    where    the recipe's table, for messages

    Raises
        ColdstillError: more than there is, heads that cannot be shared out among groups, sizes the
            family cannot have, or a budget in which nothing fits
    """
    given = config.given
    for name, size in given.items():
        there = getattr(anatomy.sizes, name)
        if size > there:
            raise ColdstillError(
                f"{where}: {name} = {size}, the model that is cut has {there} "
                f"{_NAMES.get(name, name)}; choose at most that"
            )
    sizes = replace(anatomy.sizes, **given)
    fixed = set(given)
    if {"heads", "kv_heads"} & fixed:
        sizes = _with_heads(anatomy.sizes, given.get("heads"), given.get("kv_heads"), sizes, where)
    budget = config.budget(teacher)
    if anatomy.family.bound and {"heads", "kv_heads", "hidden"} & fixed:
        sizes = _bound(anatomy, sizes, given, where, chosen=budget is not None)
        fixed.add("hidden")
    if anatomy.family.multiple and ("hidden" in fixed or budget is None):
        _expect_multiple(anatomy, sizes, given, where)
    if budget is None:
        return sizes
    whole = anatomy.parameters(anatomy.sizes)
    if budget > whole:
        raise ColdstillError(
            f"{where}: parameters = {budget:,}, the model that is cut has {whole:,}; choose at "
            "most that"
        )
    return _Search(anatomy, sizes, frozenset(fixed), budget).largest(where)


def all_target_sizes(
    anatomy: Anatomy, cuts: Sequence[PruneConfig], teacher: int, where: str
) -> list[Sizes]:
    """The same of cuts that follow one another.

    Raises
        ColdstillError: as `target_sizes`, naming which one
    """
    found = []
    for number, config in enumerate(cuts, 1):
        place = where if len(cuts) == 1 else f"{where} ({number} of {len(cuts)})"
        found.append(target_sizes(anatomy, config, teacher, place))
        anatomy = anatomy.resized(found[-1])
    return found


def shortfall(config: PruneConfig, left: int, teacher: int, where: str) -> str | None:
    """A line on a budget of which much is not used, or None.

    left     parameters that the cut leaves,
    teacher  those of the model that shares are of
    """
    budget = config.budget(teacher)
    if budget is None or left >= _USED * budget:
        return None
    given = " and ".join(f"{name} = {size}" for name, size in config.given.items())
    cause = f"with {given} there cannot be more" if given else "the next larger sizes are too large"
    return (
        f"{where}: leaves {left:,} parameters, {left / teacher:.1%} of the teacher's, of the "
        f"{budget:,} that parameters = {config.parameters} allows; {cause}"
    )


def _with_heads(
    whole: Sizes, heads: int | None, kv_heads: int | None, sizes: Sizes, where: str
) -> Sizes:
    """With the heads asked for; one of both numbers may follow from the other."""
    group = whole.heads // whole.kv_heads
    if kv_heads is None:
        # where each query head has its own key and value, these go with it
        kv_heads = whole.kv_heads if group > 1 else heads
    assert kv_heads is not None
    heads = kv_heads * group if heads is None else heads
    if heads % kv_heads:
        raise ColdstillError(
            f"{where}: heads = {heads} cannot be shared out among {kv_heads} key-value heads; "
            f"choose {_multiples(kv_heads, heads, whole.heads)}, or other kv_heads"
        )
    if heads // kv_heads > group:
        raise ColdstillError(
            f"{where}: heads = {heads} are {heads // kv_heads} to each of {kv_heads} key-value "
            f"heads, the model that is cut has {group} to each; choose at most {kv_heads * group}"
        )
    return replace(sizes, heads=heads, kv_heads=kv_heads)


def _bound(
    anatomy: Anatomy, sizes: Sizes, given: Mapping[str, int], where: str, *, chosen: bool
) -> Sizes:
    """Where `hidden` is heads times their width: heads follow from it. It follows from heads only
    where sizes are `chosen` anyway: they are few, and it is the width of everything."""
    width, whole = anatomy.head_width, anatomy.sizes
    by_heads = [f"{name} = {given[name]}" for name in ("heads", "kv_heads") if name in given]
    heads = sizes.heads if by_heads else sizes.hidden // width
    hidden = heads * width
    rule = f"hidden of a {anatomy.name!r} model is heads times {width}, the width of its heads, "
    if "hidden" in given and sizes.hidden != hidden:
        asked = " and ".join([f"hidden = {sizes.hidden}", *by_heads])
        fitting = hidden if by_heads else _multiples(width, sizes.hidden, whole.hidden)
        raise ColdstillError(
            f"{where}: {asked}: {rule}which pruning keeps; choose hidden = {fitting}"
        )
    if "hidden" not in given and hidden != whole.hidden and not chosen:
        raise ColdstillError(
            f"{where}: {by_heads[0]}: {rule}so it would fall from {whole.hidden} too; give "
            f"hidden = {hidden} with it if it may, or keep the heads"
        )
    return replace(sizes, hidden=hidden, heads=heads, kv_heads=heads)


def _expect_multiple(anatomy: Anatomy, sizes: Sizes, given: Mapping[str, int], where: str) -> None:
    """Where `hidden` must be a multiple of heads; names what was asked for, and what would do."""
    hidden, heads = sizes.hidden, sizes.heads
    if hidden % heads == 0:
        return
    wants = f"which a {anatomy.name!r} configuration wants"
    nearest = _multiples(heads, hidden, anatomy.sizes.hidden)
    if "hidden" in given:
        raise ColdstillError(
            f"{where}: hidden = {hidden} is not a multiple of its {heads} heads, {wants}; choose "
            f"{nearest}"
        )
    name = "heads" if "heads" in given else "kv_heads"
    raise ColdstillError(
        f"{where}: {name} = {given[name]}: hidden, which is {hidden}, is not a multiple of {heads} "
        f"heads, {wants}; give hidden = {nearest} too, or other {name}"
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """The largest sizes within a budget, by the rule above."""

    anatomy: Anatomy
    sizes: Sizes
    fixed: frozenset[str]
    budget: int

    def largest(self, where: str) -> Sizes:
        """Raises ColdstillError if nothing fits."""
        for turn in _TURNS:
            for layers in self._layers(turn):
                if (found := self._widest(layers, turn)) is not None:
                    return found
        smallest = min(
            self.anatomy.parameters(replace(sizes, feed_forward=self._neurons(_TURNS[-1])[0]))
            for sizes in self._widths(self._layers(_TURNS[-1])[-1], _TURNS[-1])
        )
        raise ColdstillError(
            f"{where}: parameters = {self.budget:,} leave nothing of this {self.anatomy.name!r} "
            f"model; the least it can have here are {smallest:,}"
        )

    def _layers(self, turn: int) -> list[int]:
        whole = self.sizes.layers
        if "layers" in self.fixed:
            return [whole]
        # from where the turn before has ended
        return list(range(_least(whole, turn - 1), _least(whole, turn) - 1, -1))

    def _neurons(self, turn: int) -> tuple[int, int]:
        """The fewest and the most."""
        whole = self.sizes.feed_forward
        fewest = whole if "feed_forward" in self.fixed else _least(whole, 2 * turn)
        return fewest, whole

    def _widths(self, layers: int, turn: int) -> Iterator[Sizes]:
        """All widths of the residual stream, the widest first."""
        sizes, width = replace(self.sizes, layers=layers), self.anatomy.head_width
        if "hidden" in self.fixed:
            yield sizes
            return
        step = _step(_least(sizes.hidden, 2 * turn - 2))
        if self.anatomy.family.bound:
            step = width
        elif self.anatomy.family.multiple:
            step = _step_by_heads(step, sizes.heads, sizes.hidden)
        if not (self.anatomy.family.multiple and sizes.hidden % sizes.heads):
            yield sizes
        least = _least(sizes.hidden, 2 * turn)
        for hidden in range((sizes.hidden - 1) // step * step, least - 1, -step):
            if hidden == 0:
                return
            narrow = replace(sizes, hidden=hidden)
            if self.anatomy.family.bound:
                narrow = replace(narrow, heads=hidden // width, kv_heads=hidden // width)
            yield narrow

    def _widest(self, layers: int, turn: int) -> Sizes | None:
        """Of all that fits, what is closest to one proportion and leaves the least over."""
        fewest, most = self._neurons(turn)
        step = _step(_least(most, 2 * turn - 2))
        best: tuple[tuple[float, ...], Sizes] | None = None
        for sizes in self._widths(layers, turn):
            none, one = (
                self.anatomy.parameters(replace(sizes, feed_forward=count)) for count in (0, 1)
            )
            neurons = min(most, (self.budget - none) // (one - none))
            if neurons < most:
                neurons = neurons // step * step
            while neurons >= fewest:
                unused = 1 - (none + neurons * (one - none)) / self.budget
                apart = neurons / most - sizes.hidden / self.sizes.hidden
                if self.fixed & {"hidden", "feed_forward"}:
                    apart = 0.0
                worse = (max(_LEFT, unused), max(_APART, abs(apart)), unused + abs(apart))
                if best is None or worse < best[0]:
                    best = worse, replace(sizes, feed_forward=neurons)
                if apart <= _APART:
                    break
                neurons = (neurons - 1) // step * step
        return None if best is None else best[1]


def _least(whole: int, halvings: int) -> int:
    """What is left of a size, halved so often."""
    return max(1, -(-whole // (1 << halvings)))


def _step(size: int) -> int:
    """Of a chosen width."""
    return min(_STEP, 1 << max(0, (size // 16).bit_length() - 1))


def _step_by_heads(step: int, heads: int, hidden: int) -> int:
    """The step of a width that must be a multiple of `heads`: of 9 heads, say, 64 would make 576,
    which may be all there is, so then it is a multiple of less."""
    while step > 1 and math.lcm(step, heads) > max(step, hidden // 8):
        step //= 2
    return math.lcm(step, heads)


def _multiples(of: int, near: int, most: int) -> str:
    """The two that are nearest, for messages; none is more than `most`."""
    below = max(of, near // of * of)
    return f"{below} or {below + of}" if below + of <= most else str(below)
