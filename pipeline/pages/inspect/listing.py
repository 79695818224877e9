"""One sequence for a terminal: a few lines for each position."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from .glyphs import COLUMNS, cell, clip, flow
from .store import counted

if TYPE_CHECKING:
    from .glyphs import Glyphs
    from .sequence import Belief, Passage
    from .tokens import TokenTexts

_WIDTH = 22
"""Of a token in a column."""
_INDENT = " " * 8


def listing(passage: Passage, texts: TokenTexts, glyphs: Glyphs, top: int, path: str) -> str:
    """A head that tells how to read it, and every position that is shown."""
    lines = _head(passage, texts, glyphs, path)
    for place in passage.shown:
        if place in passage.documents or place == passage.shown.start:
            lines.append(_border(passage, place, glyphs))
        lines += _position(passage, place, texts, glyphs, top)
    return "\n".join(lines)


def _head(passage: Passage, texts: TokenTexts, glyphs: Glyphs, path: str) -> list[str]:
    shown, documents = passage.shown, counted(len(passage.documents), "document")
    part = "" if len(shown) == passage.length else f"; shown are {shown.start} to {shown.stop - 1}"
    told = (
        f"sequence {passage.row} of {path}: number {passage.id} of its corpus, "
        f"{counted(passage.length, 'token')}, {documents}, "
        f"{counted(len(passage.beliefs), 'position')} with a target{part}"
    )
    how = (
        "At each position stands its token, and then what the teacher believed, having read up to "
        "it, about the next one: p is its probability of the token that came next (label), rank "
        f"the label's place in the head; {glyphs.mark} marks it among the best. A dash: no target."
    )
    lines = [*textwrap.wrap(told, COLUMNS), *textwrap.wrap(how, COLUMNS)]
    if texts.lack:
        lines += textwrap.wrap(texts.lack, COLUMNS)
    return [*lines, "", f"{'pos':>6}  {'token':<{_WIDTH}}  {'label':<{_WIDTH}}  {_NUMBERS}"]


_NUMBERS = f"{'p':>8}  {'-log p':>6}  {'rank':>5}  {'entropy':>7}"


def _border(passage: Passage, place: int, glyphs: Glyphs) -> str:
    start = max(begin for begin in passage.documents if begin <= place)
    rest = "" if start == place else ", continued"
    return f"{glyphs.rule * 2} document {passage.documents[start]}{rest} ".ljust(
        COLUMNS, glyphs.rule
    )


def _position(
    passage: Passage, place: int, texts: TokenTexts, glyphs: Glyphs, top: int
) -> list[str]:
    token = cell(glyphs.visible(texts.of(passage.tokens[place])), _WIDTH)
    belief = passage.beliefs.get(place)
    if belief is None:
        return [f"{place:>6}  {token}  -"]
    label = cell(glyphs.visible(texts.of(belief.label)), _WIDTH)
    rank = "-" if belief.rank is None else str(belief.rank)
    numbers = (
        f"{percent(math.exp(belief.label_logprob)):>8}  {belief.surprise:>6.2f}  {rank:>5}  "
        f"{belief.entropy:>7.2f}"
    )
    return [f"{place:>6}  {token}  {label}  {numbers}", *_details(belief, texts, glyphs, top)]


def _details(belief: Belief, texts: TokenTexts, glyphs: Glyphs, top: int) -> list[str]:
    """The best tokens, and what is outside the head."""
    lines = []
    if best := [
        f"{glyphs.mark if guess.token == belief.label else ''}"
        f"{clip(glyphs.visible(texts.of(guess.token)), _WIDTH)} {percent(guess.probability)}"
        for guess in belief.head[:top]
    ]:
        lines += flow(best, _INDENT)
    masses = f"{_INDENT}head {percent(belief.head_mass)}, tail {percent(belief.tail_mass)}"
    drawn = [
        clip(glyphs.visible(texts.of(sample.token)), _WIDTH)
        + (f" {glyphs.times}{sample.count}" if sample.count > 1 else "")
        for sample in belief.samples
    ]
    return lines + flow(drawn, _INDENT, f"{masses}{': ' if drawn else ''}")


def percent(probability: float) -> str:
    """Two or three digits where there are any: `73.1%`, `0.45%`, `<0.001%`."""
    share = 100 * probability
    if share >= 0.01:
        return f"{share:.1f}%" if share >= 10 else f"{share:.2f}%"
    return f"{share:.3f}%" if share >= 0.001 else "<0.001%" if share else "0%"
