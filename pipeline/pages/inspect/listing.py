"""One sequence as text: a few lines for each position."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from ...units import counted
from .glyphs import COLUMNS, cell, clip, flow

if TYPE_CHECKING:
    from ...results.token_texts import TokenTexts
    from .glyphs import Glyphs
    from .sequence import Prediction, ShownSequence

_WIDTH = 22
"""Width of a token's column."""
_INDENT = " " * 8


def listing(sequence: ShownSequence, texts: TokenTexts, glyphs: Glyphs, top: int, path: str) -> str:
    """Return an explanation and every position that is shown."""
    lines = _head(sequence, texts, glyphs, path)
    for place in sequence.shown:
        if place in sequence.documents or place == sequence.shown.start:
            lines.append(_border(sequence, place, glyphs))
        lines += _position(sequence, place, texts, glyphs, top)
    return "\n".join(lines)


def _head(sequence: ShownSequence, texts: TokenTexts, glyphs: Glyphs, path: str) -> list[str]:
    shown, documents = sequence.shown, counted(len(sequence.documents), "document")
    part = "" if len(shown) == sequence.length else f"; shown are {shown.start} to {shown.stop - 1}"
    summary = (
        f"sequence {sequence.row} of {path}: number {sequence.id} of its corpus, "
        f"{counted(sequence.length, 'token')}, {documents}, "
        f"{counted(len(sequence.predictions), 'position')} with a target{part}"
    )
    how = (
        "Each line has a token and the teacher's prediction of the next one (label), made from all "
        "tokens so far: p is the probability of the label, rank its place in the head; "
        f"{glyphs.mark} marks the label among the best tokens. A dash means no target."
    )
    lines = [*textwrap.wrap(summary, COLUMNS), *textwrap.wrap(how, COLUMNS)]
    if texts.lack:
        lines += textwrap.wrap(texts.lack, COLUMNS)
    return [*lines, "", f"{'pos':>6}  {'token':<{_WIDTH}}  {'label':<{_WIDTH}}  {_NUMBERS}"]


_NUMBERS = f"{'p':>8}  {'-log p':>6}  {'rank':>5}  {'entropy':>7}"


def _border(sequence: ShownSequence, place: int, glyphs: Glyphs) -> str:
    start = max(begin for begin in sequence.documents if begin <= place)
    rest = "" if start == place else ", continued"
    return f"{glyphs.rule * 2} document {sequence.documents[start]}{rest} ".ljust(
        COLUMNS, glyphs.rule
    )


def _position(
    sequence: ShownSequence, place: int, texts: TokenTexts, glyphs: Glyphs, top: int
) -> list[str]:
    token = cell(glyphs.visible(texts.of(sequence.tokens[place])), _WIDTH)
    prediction = sequence.predictions.get(place)
    if prediction is None:
        return [f"{place:>6}  {token}  -"]
    label = cell(glyphs.visible(texts.of(prediction.label)), _WIDTH)
    rank = "-" if prediction.rank is None else str(prediction.rank)
    numbers = (
        f"{percent(math.exp(prediction.label_logprob)):>8}  {prediction.surprise:>6.2f}  "
        f"{rank:>5}  {prediction.entropy:>7.2f}"
    )
    return [f"{place:>6}  {token}  {label}  {numbers}", *_details(prediction, texts, glyphs, top)]


def _details(prediction: Prediction, texts: TokenTexts, glyphs: Glyphs, top: int) -> list[str]:
    """Return lines with the best tokens, and with the samples outside the head."""
    lines = []
    if best := [
        f"{glyphs.mark if guess.token == prediction.label else ''}"
        f"{clip(glyphs.visible(texts.of(guess.token)), _WIDTH)} {percent(guess.probability)}"
        for guess in prediction.head[:top]
    ]:
        lines += flow(best, _INDENT)
    masses = f"{_INDENT}head {percent(prediction.head_mass)}, tail {percent(prediction.tail_mass)}"
    drawn = [
        clip(glyphs.visible(texts.of(sample.token)), _WIDTH)
        + (f" {glyphs.times}{sample.count}" if sample.count > 1 else "")
        for sample in prediction.samples
    ]
    return lines + flow(drawn, _INDENT, f"{masses}{': ' if drawn else ''}")


def percent(probability: float) -> str:
    """Return a percentage with two or three digits: `73.1%`, `0.45%`, `<0.001%`."""
    share = 100 * probability
    if share >= 0.01:
        return f"{share:.1f}%" if share >= 10 else f"{share:.2f}%"
    return f"{share:.3f}%" if share >= 0.001 else "<0.001%" if share else "0%"
