"""Documents (a text, a prompt with its completion, or a chat), bad rows, and values in one form.

Equal rows of all formats are equal documents. A table gives each object the keys of all its
objects, loses the order of keys, and mixes integers with floats. Rows of JSON get the same form.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REASONS = {
    "incomplete_rows": "rows without a column that is needed",
    "wrong_values": "rows with a value of the wrong type",
    "broken_text": "rows with half a surrogate pair",
    "unknown_roles": "chats with an unknown role",
    "broken_tool_calls": "rows with a tool call or tool that cannot be read",
    "unwanted_answers": "rows whose label marks the completion as unwanted",
    "unanswered_chats": "chats without an answer of the assistant",
}
"""The faults of a record, with the text for a count of them."""


class BadRowError(ColdstillError):
    """A row that cannot be used; a recipe may skip such rows."""

    def __init__(self, kind: str, where: str, reason: str) -> None:
        """Name the fault; `kind` is its key in `CorpusRecord.counts`."""
        super().__init__(f'{where}: {reason}, or skip such rows with corpus.bad_rows = "skip"')
        self.kind = kind
        self.fault = f"{where}: {reason}"


def refuse(bad: BadRowError) -> None:
    raise bad


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
        turns = (("system", self.system), ("user", asked), ("assistant", self.text))
        messages = tuple({"role": role, "content": text} for role, text in turns if text)
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
        # left out if both are empty, so that the digest equals that of earlier versions
        if self.tools or self.documents:
            content += [list(self.tools), list(self.documents)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split.

    The split depends on the content alone: adding, removing or reordering documents does not move
    others, and copies of a text are always in the same split.
    """
    return int.from_bytes(digest[:8], "little") < share * 2.0**64


_DEEPEST = 100
"""The deepest nesting that is read, as chat templates and digests recurse."""
_EXACT = 2**53
"""Below this an integer and a float of the same value are equal."""
_USUAL_ORDER = (
    "role", "content", "type", "id", "function", "name", "title", "description", "strict",
    "arguments", "parameters", "properties", "required", "text",
)  # fmt: skip
_RANK = {key: rank for rank, key in enumerate(_USUAL_ORDER)}


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Replaces a JSON object that has a key twice."""

    key: str


def parse_json(text: str) -> Any:
    """Parse JSON; an object that has a key twice becomes an `Ambiguous`.

    Raises
        ValueError: the text is not valid JSON
        RecursionError: the value is nested too deeply
    """
    return json.loads(text, object_pairs_hook=_object)


def parsed(value: Any) -> Any:
    """The value, parsed if it is a text with JSON.

    A table whose values have different types holds them as JSON, as `datasets` writes it.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return parse_json(value)
    return value


def canonical(where: str, value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it, equal for all formats.

    Keys have a fixed order without null values. Integral floats become integers, decimals numbers,
    times text, and bytes the text that they encode.

    Raises
        BadRowError: the value holds a number that JSON cannot hold, text or bytes that are not
            valid text, or more than 100 levels of nesting
    """
    if depth > _DEEPEST:
        raise BadRowError(
            "wrong_values", where, f"is nested deeper than {_DEEPEST} levels; repair it"
        )
    if isinstance(value, str):
        return checked_text(where, value)
    if isinstance(value, Ambiguous):
        raise BadRowError("wrong_values", where, f"holds {shown(value)}; repair the row")
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, dict):
        pairs = {checked_text(where, str(k)): v for k, v in value.items() if v is not None}
        return {key: canonical(where, pairs[key], depth + 1) for key in sorted(pairs, key=_order)}
    if isinstance(value, list | tuple):
        return [canonical(where, part, depth + 1) for part in value]
    if isinstance(value, float | Decimal):
        return _number(where, value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            fault = f"holds {shown(value)}, which is not text; repair the row"
            raise BadRowError("wrong_values", where, fault) from error
    return str(value)


def checked_text(where: str, text: str, what: str = "a value") -> str:
    """The text, if it is valid; `what` names its holder in a message. Raises BadRowError if it has
    half a surrogate pair, which JSON allows but no tokenizer reads."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(
                "broken_text",
                where,
                f"{what} has half a surrogate pair at character {error.start}, which is not text; "
                "repair or leave out the record",
            ) from error
    return text


def shown(value: Any) -> str:
    """A value with its type, shortened for a message."""
    if isinstance(value, Ambiguous):
        return f"an object with the key {value.key!r} twice"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _order(key: str) -> tuple[int, str]:
    return _RANK.get(key, len(_RANK)), key


def _number(where: str, value: float | Decimal) -> int | float:
    if not math.isfinite(value):
        fault = f"holds {shown(value)}, which is not a number of JSON; repair the row"
        raise BadRowError("wrong_values", where, fault)
    number = float(value)
    if number.is_integer() and (isinstance(value, Decimal) or abs(number) < _EXACT):
        return int(value)
    return number


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    return Ambiguous(next(key for key in found if keys.count(key) > 1))


def listed(names: Iterable[Any]) -> str:
    """Names of columns or keys for a message; `none` if there are none."""
    texts = (str(name) for name in names)
    return ", ".join(text if text.isprintable() else ascii(text) for text in texts) or "none"
