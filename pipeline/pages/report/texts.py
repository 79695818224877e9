"""The models' continuations of a few held-out prompts, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...recipe.tables import TEACHER
from ..inspect.store import counted

if TYPE_CHECKING:
    from ...results.continuations import Continuations, PromptTexts
    from ...results.facts import ReportFacts

Pieces = list[tuple[str, int]]
"""Parts of a text; a number stands for that many line ends in a row, 0 for text."""
_MANY = 4
"""Line ends in a row from which on they are counted instead of shown."""


@dataclass(frozen=True, slots=True)
class TextColumn:
    """One continuation."""

    name: str
    detail: str
    text: Pieces
    kind: str
    """CSS class: what followed in the document, or the text of a model."""


@dataclass(frozen=True, slots=True)
class PromptView:
    """One prompt with its continuations."""

    where: str
    text: Pieces
    columns: list[TextColumn]


@dataclass(frozen=True, slots=True)
class TextsView:
    """The section; without prompts its caption says why."""

    prompts: list[PromptView]
    caption: str


def texts_view(facts: ReportFacts) -> TextsView | None:
    """Every prompt, what followed it, and each model's continuation; None if not asked for."""
    texts = facts.continuations
    if texts is None:
        why = facts.no_continuations
        return TextsView([], f"Not shown: {why}.") if why else None
    if not texts.prompts:
        return TextsView([], "No held-out document is long enough for a prompt and what follows.")
    return TextsView([_prompt(one, facts.baseline) for one in texts.prompts], _caption(texts))


def _prompt(prompt: PromptTexts, baseline: str | None) -> PromptView:
    columns = [TextColumn("What came next", "", _pieces(prompt.next), "truth")]
    for name, text in prompt.models.items():
        detail = "no teacher" if name == baseline else ""
        columns.append(TextColumn(_name(name), detail, _pieces(text), "model"))
    where = f"document {prompt.document:,}, sequence {prompt.sequence:,} of the held-out store"
    return PromptView(where, _pieces(prompt.text), columns)


def _caption(texts: Continuations) -> str:
    count = len(texts.prompts)
    few = f" (of {texts.asked} asked for)" if count < texts.asked else ""
    parts = [
        f"Beginnings of {counted(count, 'held-out document')}{few}, chosen at random by seed "
        f"{texts.seed}. Tokens are sampled at temperature {texts.temperature:g} with the same "
        "random numbers for every model: where two models agree, so do their texts. Loss and KL "
        "above say more than a few texts.",
        *(f"{_name(name)}: not shown, {why}." for name, why in texts.missing.items()),
        f"{texts.note}." if texts.note else "",
    ]
    return " ".join(filter(None, parts))


def _name(name: str) -> str:
    return "Teacher" if name == TEACHER else name


def _pieces(text: str) -> Pieces:
    """The text with its own line ends, but many of them in a row as a number."""
    pieces = re.split(rf"(\n{{{_MANY},}})", text)
    return [(piece, len(piece) * (i % 2)) for i, piece in enumerate(pieces) if piece]
