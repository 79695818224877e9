"""One text, one prompt with its completion, or one chat."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the corpus is made of, before any tokenizer has seen it."""

    where: str
    """`path` or `path:line`, for messages to the user."""
    text: str = ""
    """Everything that is to be learned, unless `messages` is given."""
    prompt: str = ""
    """What stands before `text` and is read but not learned."""
    messages: tuple[dict[str, Any], ...] = ()
    """A chat: mappings with at least `role` and `content`, for the tokenizer's chat template."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the assistant of a chat may call, for the chat template."""
    documents: tuple[dict[str, Any], ...] = ()
    """The documents that the assistant of a chat may look into, for the chat template."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not self.text and not self.messages

    @property
    def size(self) -> int:
        """UTF-8 bytes of all its text, for figures per byte."""
        contents = (str(message.get("content") or "") for message in self.messages)
        return sum(len(text.encode()) for text in (self.prompt, self.text, *contents))

    def digest(self) -> bytes:
        """SHA-256 of the content alone: the same text has the same digest wherever it is found."""
        content = [self.prompt, self.text, list(self.messages)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split.

    A function of the content alone, so adding, removing or reordering documents never moves
    another one across, and copies of one text always land on the same side.
    """
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
