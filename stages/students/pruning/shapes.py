"""Target sizes of a pruned model from the recipe's settings. Loads no torch.

With a parameter budget, the sizes that are not given are chosen. Width shrinks before depth, and
heads stay, as in the models of Minitron (Muralidharan et al., arXiv 2407.14679 and 2408.11796): the
residual stream and the feed-forward layers shrink in the same proportion to a quarter. Then layers
are removed until half are left, then the widths shrink to a quarter again, and so on. The rest of
the budget goes to the feed-forward layers. If the steps of the residual stream are so large that
both widths would then be out of proportion, up to a twentieth of the budget stays unused instead.

Held-out loss of the demo's teacher of three layers (4.891), cut and trained for 200 steps: with
half of the parameters 4.907 on three layers and 4.927 on two; with a quarter 4.921, 4.934 and, on
one layer, 4.988. Removing two of four heads costs 0.7 before training, as much as removing 100 of
256 channels.
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
"""Each turn shrinks the widths to a quarter, then the layers to half."""
_STEP = 64
"""Chosen widths are multiples of this, which suits matrix units, or of a smaller power of two:
about a 16th of the width at the start of a turn."""
_LEFT = 0.05
"""Share of a budget that may stay unused."""
_APART = 1 / 16
"""Accepted difference between the kept shares of both widths. Beyond it more of the budget may stay
unused."""
_USED = 0.9
"""A note is reported if less than this share of a budget is used."""
_NAMES = {"hidden": "channels", "feed_forward": "neurons", "kv_heads": "key-value heads"}


def target_sizes(anatomy: Anatomy, config: PruneConfig, teacher: int, where: str) -> Sizes:
    """Target sizes of one cut.

    teacher  parameters of the teacher, of which budgets are shares
    where    the recipe's table, for messages

    Raises
        ColdstillError: sizes larger than the model's, heads that do not divide among key-value
            heads, sizes that the family does not support, or a budget that is too small
    """
    given = config.given
    for name, size in given.items():
        most = getattr(anatomy.sizes, name)
        if size > most:
            raise ColdstillError(
                f"{where}: {name} = {size}, the model to cut has {most} "
                f"{_NAMES.get(name, name)}; choose at most this"
            )
    sizes = replace(anatomy.sizes, **given)
    fixed = set(given)
    if {"heads", "kv_heads"} & fixed:
        sizes = _with_heads(anatomy.sizes, given.get("heads"), given.get("kv_heads"), sizes, where)
    budget = config.budget(teacher)
    if anatomy.layout.bound and {"heads", "kv_heads", "hidden"} & fixed:
        sizes = _bound(anatomy, sizes, given, where, chosen=budget is not None)
        fixed.add("hidden")
    if anatomy.layout.multiple and ("hidden" in fixed or budget is None):
        _expect_multiple(anatomy, sizes, given, where)
    if budget is None:
        return sizes
    whole = anatomy.parameters(anatomy.sizes)
    if budget > whole:
        raise ColdstillError(
            f"{where}: parameters = {budget:,}, the model to cut has {whole:,}; choose at most this"
        )
    return _Search(anatomy, sizes, frozenset(fixed), budget).largest(where)


def all_target_sizes(
    anatomy: Anatomy, cuts: Sequence[PruneConfig], teacher: int, where: str
) -> list[Sizes]:
    """Target sizes of several cuts, one after another.

    Raises
        ColdstillError: as `target_sizes`, with the number of the cut
    """
    found = []
    for number, config in enumerate(cuts, 1):
        key = where if len(cuts) == 1 else f"{where} ({number} of {len(cuts)})"
        found.append(target_sizes(anatomy, config, teacher, key))
        anatomy = anatomy.resized(found[-1])
    return found


def shortfall(config: PruneConfig, left: int, teacher: int, where: str) -> str | None:
    """A note if much of a budget stays unused, or None.

    left     parameters of the pruned model
    teacher  parameters of the teacher, of which budgets are shares
    """
    budget = config.budget(teacher)
    if budget is None or left >= _USED * budget:
        return None
    given = " and ".join(f"{name} = {size}" for name, size in config.given.items())
    cause = f"{given} does not allow more" if given else "the next larger sizes are too large"
    return (
        f"{where}: leaves {left:,} parameters, {left / teacher:.1%} of the teacher's, of the "
        f"{budget:,} that parameters = {config.parameters} allows; {cause}"
    )


def _with_heads(
    whole: Sizes, heads: int | None, kv_heads: int | None, sizes: Sizes, where: str
) -> Sizes:
    """Sizes with the given heads; one of both numbers may follow from the other."""
    group = whole.heads // whole.kv_heads
    if kv_heads is None:
        # key-value heads with a single query head are removed with it
        kv_heads = whole.kv_heads if group > 1 else heads
    assert kv_heads is not None
    heads = kv_heads * group if heads is None else heads
    if heads % kv_heads:
        raise ColdstillError(
            f"{where}: heads = {heads} cannot be divided among {kv_heads} key-value heads; "
            f"choose {_multiples(kv_heads, heads, whole.heads)}, or other kv_heads"
        )
    if heads // kv_heads > group:
        raise ColdstillError(
            f"{where}: heads = {heads} are {heads // kv_heads} to each of {kv_heads} key-value "
            f"heads, the model to cut has {group} to each; choose at most {kv_heads * group}"
        )
    return replace(sizes, heads=heads, kv_heads=kv_heads)


def _bound(
    anatomy: Anatomy, sizes: Sizes, given: Mapping[str, int], where: str, *, chosen: bool
) -> Sizes:
    """Sizes of a family whose `hidden` is heads times their width. Heads follow from `hidden`;
    `hidden`, the width of everything, follows from heads only if sizes are `chosen`."""
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
            f"{where}: {by_heads[0]}: {rule}so it would fall from {whole.hidden} too; add "
            f"hidden = {hidden} to accept that, or keep the heads"
        )
    return replace(sizes, hidden=hidden, heads=heads, kv_heads=heads)


def _expect_multiple(anatomy: Anatomy, sizes: Sizes, given: Mapping[str, int], where: str) -> None:
    """Refuse a `hidden` that is not a multiple of heads."""
    hidden, heads = sizes.hidden, sizes.heads
    if hidden % heads == 0:
        return
    rule = f"as a {anatomy.name!r} configuration requires"
    nearest = _multiples(heads, hidden, anatomy.sizes.hidden)
    if "hidden" in given:
        raise ColdstillError(
            f"{where}: hidden = {hidden} is not a multiple of its {heads} heads, {rule}; choose "
            f"{nearest}"
        )
    name = "heads" if "heads" in given else "kv_heads"
    raise ColdstillError(
        f"{where}: {name} = {given[name]}: hidden, which is {hidden}, is not a multiple of {heads} "
        f"heads, {rule}; add hidden = {nearest}, or choose other {name}"
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """Finds the largest sizes within a budget, by the rule in the module's docstring."""

    anatomy: Anatomy
    sizes: Sizes
    fixed: frozenset[str]
    budget: int

    def largest(self, where: str) -> Sizes:
        """The sizes; raises ColdstillError if none fit."""
        for turn in _TURNS:
            for layers in self._layers(turn):
                if (found := self._widest(layers, turn)) is not None:
                    return found
        smallest = min(
            self.anatomy.parameters(replace(sizes, feed_forward=self._neurons(_TURNS[-1])[0]))
            for sizes in self._widths(self._layers(_TURNS[-1])[-1], _TURNS[-1])
        )
        raise ColdstillError(
            f"{where}: parameters = {self.budget:,} are too few for this {self.anatomy.name!r} "
            f"model; it needs at least {smallest:,} with these settings"
        )

    def _layers(self, turn: int) -> list[int]:
        whole = self.sizes.layers
        if "layers" in self.fixed:
            return [whole]
        # the range begins where the turn before ended
        return list(range(_least(whole, turn - 1), _least(whole, turn) - 1, -1))

    def _neurons(self, turn: int) -> tuple[int, int]:
        """Fewest and most neurons."""
        whole = self.sizes.feed_forward
        fewest = whole if "feed_forward" in self.fixed else _least(whole, 2 * turn)
        return fewest, whole

    def _widths(self, layers: int, turn: int) -> Iterator[Sizes]:
        """Sizes with every width of the residual stream, widest first."""
        sizes, width = replace(self.sizes, layers=layers), self.anatomy.head_width
        if "hidden" in self.fixed:
            yield sizes
            return
        step = _step(_least(sizes.hidden, 2 * turn - 2))
        if self.anatomy.layout.bound:
            step = width
        elif self.anatomy.layout.multiple:
            step = _step_by_heads(step, sizes.heads, sizes.hidden)
        if not (self.anatomy.layout.multiple and sizes.hidden % sizes.heads):
            yield sizes
        least = _least(sizes.hidden, 2 * turn)
        for hidden in range((sizes.hidden - 1) // step * step, least - 1, -step):
            if hidden == 0:
                return
            narrow = replace(sizes, hidden=hidden)
            if self.anatomy.layout.bound:
                narrow = replace(narrow, heads=hidden // width, kv_heads=hidden // width)
            yield narrow

    def _widest(self, layers: int, turn: int) -> Sizes | None:
        """The sizes that fit, are closest to one proportion and use most of the budget."""
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
    """A size after a number of halvings, at least 1."""
    return max(1, -(-whole // (1 << halvings)))


def _step(size: int) -> int:
    return min(_STEP, 1 << max(0, (size // 16).bit_length() - 1))


def _step_by_heads(step: int, heads: int, hidden: int) -> int:
    """Step of a width that must be a multiple of `heads`. With 9 heads a step of 64 would make 576,
    perhaps the whole width, so the step is then a multiple of a smaller number."""
    while step > 1 and math.lcm(step, heads) > max(step, hidden // 8):
        step //= 2
    return math.lcm(step, heads)


def _multiples(of: int, near: int, most: int) -> str:
    """The two nearest multiples of at most `most`, for messages."""
    below = max(of, near // of * of)
    return f"{below} or {below + of}" if below + of <= most else str(below)
