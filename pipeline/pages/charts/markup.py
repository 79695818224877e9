"""Markup that text cannot break out of: elements are made here and nowhere else."""

from __future__ import annotations

import html
import re

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What neither HTML nor a UTF-8 file can hold."""


class Markup(str):
    """Text that is markup already; any other string is escaped where it is put into an element."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: str | float | None) -> Markup:
    """`<tag attribute="...">content</tag>`.

    attributes  `cls` is the class and `_` is `-` in a name; one that is None is left out
    """
    shown = "".join(
        f' {"class" if name == "cls" else name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}>{joined(*content)}</{tag}>")


def joined(*parts: str) -> Markup:
    """Parts one after another, those that are no markup escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escaped(part) for part in parts))


def escaped(text: str) -> Markup:
    """Text as it may stand between tags and in an attribute."""
    return Markup(html.escape(_UNSEEN.sub("\ufffd", text)))


def number(value: float) -> str:
    """A length or place, to a hundredth of a pixel."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _value(value: str | float) -> str:
    return escaped(value) if isinstance(value, str) else number(value)
