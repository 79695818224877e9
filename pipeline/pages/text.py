"""Text from recipes, corpora and models as a page may hold it."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What neither HTML nor a UTF-8 file can hold."""


def printable(text: str) -> str:
    """The text with a replacement character for each one that a page cannot hold."""
    return _UNSEEN.sub("\ufffd", text)
