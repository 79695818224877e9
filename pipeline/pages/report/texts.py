"""What the models make of a few held-out prompts, side by side."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ...recipe.tables import TEACHER
from ..charts import Markup, element, joined
from ..inspect.store import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

Facts = dict[str, Any]
_MANY = 4
"""Line ends that are counted instead of left empty."""


def texts_section(facts: Mapping[str, Any]) -> Markup:
    """Every prompt, what came next and what each model writes; nothing if none was asked for."""
    texts = facts["continuations"]
    if texts is None:
        why = facts["no_continuations"]
        if not why:
            return joined()
        return _section(element("p", f"Not shown: {why}.", cls="none"))
    prompts = [_prompt(prompt, facts) for prompt in texts["prompts"]]
    if not prompts:
        none = "No held-out document is long enough to be cut into a prompt and what came next."
        return _section(element("p", none, cls="none"))
    return _section(*prompts, element("p", _caption(texts), cls="caption"))


def _section(*content: Markup) -> Markup:
    title = element("h2", "What they write")
    return element("section", title, *content, cls="whole texts")


def _caption(texts: Facts) -> str:
    count = len(texts["prompts"])
    begun = counted(count, "held-out document")
    few = f" (of {texts['asked']} asked for)" if count < texts["asked"] else ""
    parts = [
        f"Beginnings of {begun}{few}, chosen by seed {texts['seed']}; nobody picked them. Tokens "
        f"are drawn at temperature {texts['temperature']:g}, by the same numbers for every model: "
        "where two agree, so do their texts. Loss and KL above say more than a few of them.",
        *(f"{_name(name)}: not shown, {why}." for name, why in texts["missing"].items()),
        f"{texts['note']}." if texts["note"] else "",
    ]
    return " ".join(part for part in parts if part)


def _prompt(prompt: Facts, facts: Mapping[str, Any]) -> Markup:
    where = (
        f"document {prompt['document']:,}, sequence {prompt['sequence']:,} of the held-out store"
    )
    columns = [_column("What came next", "", prompt["next"], "truth")]
    for name, text in prompt["models"].items():
        role = "no teacher" if name == facts["baseline"] else ""
        columns.append(_column(_name(name), role, text, "model"))
    return element(
        "article",
        element("div", element("p", "Prompt ", element("small", where)), _text(prompt["text"]),
                cls="prompt"),
        element("div", *columns, cls="columns"),
    )  # fmt: skip


def _name(name: str) -> str:
    return "Teacher" if name == TEACHER else name


def _column(name: str, detail: str, text: str, kind: str) -> Markup:
    label = element("p", element("b", element("bdi", name)), " ", element("small", detail))
    return element("div", label, _text(text), cls=kind)


def _text(text: str) -> Markup:
    """As it is, with its own line ends, but for many of them in a row; direction is kept inside."""
    if not text:
        return element("pre", element("i", "nothing: it ends here"))
    pieces = re.split(rf"(\n{{{_MANY},}})", text)
    shown = (
        element("i", f" {len(piece)} line ends ") if i % 2 else joined(piece)
        for i, piece in enumerate(pieces)
    )
    return element("pre", element("bdi", *shown))
