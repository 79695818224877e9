"""The words around the models' continuations of a few held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...recipe.tables import TEACHER
from ...units import counted

if TYPE_CHECKING:
    from ...results.continuations import Continuations
    from ...results.facts import ReportFacts


def texts_caption(texts: Continuations) -> str:
    """How prompts were chosen and tokens sampled, and which models are missing."""
    count = len(texts.prompts)
    few = f" (of {texts.asked} asked for)" if count < texts.asked else ""
    parts = [
        f"Beginnings of {counted(count, 'held-out document')}{few}, chosen at random by seed "
        f"{texts.seed}. Tokens are sampled at temperature {texts.temperature:g} with the same "
        "random numbers for every model: where two models agree, so do their texts. Loss and KL "
        "above say more than a few texts.",
        *(
            f"{'Teacher' if name == TEACHER else name}: not shown, {why}."
            for name, why in texts.missing.items()
        ),
        f"{texts.note}." if texts.note else "",
    ]
    return " ".join(filter(None, parts))


def no_texts(facts: ReportFacts) -> str:
    """The reason why there are no continuations; empty if there are some or none were asked for."""
    if facts.continuations is None:
        return f"Not shown: {facts.no_continuations}." if facts.no_continuations else ""
    if facts.continuations.prompts:
        return ""
    return "No held-out document is long enough for a prompt and what follows."
