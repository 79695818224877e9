"""One text, one prompt with its completion, or one chat."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the corpus is made of, before any tokenizer has seen it."""

    where: str
    """`path` or `path:line`, for messages to the user."""
    text: str = ""
    """Everything that is to be learned, unless `messages` is given."""
    prompt: str = ""
    """What stands before `text` and is read but not learned."""
    system: str = ""
    """What `prompt` begins with where the row has a system text beside it."""
    messages: tuple[dict[str, Any], ...] = ()
    """A chat: mappings with at least `role` and `content`, for the tokenizer's chat template."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the chat may use, for its template."""
    documents: tuple[dict[str, Any], ...] = ()
    """The documents that the chat refers to, for its template."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not self.text and not self.messages

    def as_chat(self) -> Document:
        """The same as a chat: the system text, the prompt and the text are a message each. A chat
        stays as it is."""
        if self.messages:
            return self
        asked = self.prompt.removeprefix(f"{self.system}\n\n") if self.system else self.prompt
        said = (("system", self.system), ("user", asked), ("assistant", self.text))
        messages = tuple({"role": role, "content": text} for role, text in said if text)
        return replace(self, text="", prompt="", system="", messages=messages)

    @property
    def size(self) -> int:
        """UTF-8 bytes of all its text, for figures per byte."""
        texts = [self.prompt, self.text, *self.contents()]
        return sum(len(text.encode()) for text in texts)

    def contents(self) -> Iterator[str]:
        """The texts of a chat: what is said, thought and called, and what is given beside it."""
        for message in self.messages:
            content = message.get("content") or ""
            parts = content if isinstance(content, list) else [{"text": content}]
            yield from (str(part.get("text") or "") for part in parts)
            yield str(message.get("reasoning_content") or "")
            calls = message.get("tool_calls")
            yield json.dumps(calls, ensure_ascii=False) if calls else ""
        for value in (*self.tools, *self.documents):
            yield json.dumps(value, ensure_ascii=False)

    def digest(self) -> bytes:
        """SHA-256 of the content alone: the same text has the same digest wherever it is found."""
        content: list[Any] = [self.prompt, self.text, list(self.messages)]
        if self.tools or self.documents:  # a document without them keeps the digest it always had
            content += [list(self.tools), list(self.documents)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split.

    A function of the content alone, so adding, removing or reordering documents never moves
    another one across, and copies of one text always land on the same side.
    """
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
