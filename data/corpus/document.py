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
    """One document of the corpus, before it is tokenised."""

    where: str
    """`path` or `path:line`, for messages."""
    text: str = ""
    """The text that is learned, unless `messages` is given."""
    prompt: str = ""
    """The text before `text`, which is read but not learned."""
    system: str = ""
    """The system text at the beginning of `prompt`, if the row has one."""
    messages: tuple[dict[str, Any], ...] = ()
    """A chat: messages with at least `role` and `content`, for the tokenizer's chat template."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools of the chat, for its template."""
    documents: tuple[dict[str, Any], ...] = ()
    """The documents that the chat refers to, for its template."""

    @property
    def is_empty(self) -> bool:
        """Whether the document has no text to learn."""
        return not self.text and not self.messages

    def as_chat(self) -> Document:
        """The document as a chat: system text, prompt and text become one message each."""
        if self.messages:
            return self
        asked = self.prompt.removeprefix(f"{self.system}\n\n") if self.system else self.prompt
        said = (("system", self.system), ("user", asked), ("assistant", self.text))
        messages = tuple({"role": role, "content": text} for role, text in said if text)
        return replace(self, text="", prompt="", system="", messages=messages)

    @property
    def size(self) -> int:
        """Size of all its text in UTF-8, for figures per byte."""
        texts = [self.prompt, self.text, *self.contents()]
        return sum(len(text.encode()) for text in texts)

    def contents(self) -> Iterator[str]:
        """The texts of a chat: contents, reasoning and tool calls, then tools and documents."""
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
        """SHA-256 of the content alone, independent of its source."""
        content: list[Any] = [self.prompt, self.text, list(self.messages)]
        if self.tools or self.documents:  # otherwise the digest is that of earlier versions
            content += [list(self.tools), list(self.documents)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split.

    The split depends on the content alone: adding, removing or reordering documents does not move
    others, and copies of a text are always in the same split.
    """
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
