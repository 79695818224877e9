"""From a record (one JSON object, one table row) to a `Document`."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError
from .columns import PromptColumns, known_records
from .document import Document

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from .columns import Columns

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def used_columns(where: str, names: Collection[str], columns: Columns) -> list[str]:
    """Those of a table's columns that its documents can be made of; the others need no reading.

    Raises
        ColdstillError: they are not enough
    """
    if not columns.are_recognised:
        chosen = _choose(where, names, columns)
        there = [name for name in chosen.optional if name in names]
        return list(dict.fromkeys([*chosen.needed, *there]))
    _choose(where, names, columns)
    used = {"input"}.union(*(known.needed for known in known_records(columns)))
    return [name for name in names if name in used]


def to_document(where: str, record: Any, columns: Columns) -> Document:
    """Make a document of a record; null and empty values make an empty one.

    Raises
        ColdstillError: it is no object, a column is missing or holds something else
    """
    if not isinstance(record, dict):
        raise ColdstillError(
            f'{where}: {_shown(record)} is no record, expected an object such as {{"text": "..."}}'
        )
    chosen = _choose(where, record, columns)
    named = [(name, record[name]) for name in chosen.needed]
    named += [(name, record[name]) for name in chosen.optional if record.get(name) is not None]
    if chosen.messages is not None:
        return Document(where=where, messages=_chat(where, *named[0], columns))
    if chosen.prompt is None:
        return Document(where=where, text=_string(where, *named[0]))
    if all(isinstance(value, list) for _, value in named):
        messages = [m for name, value in named for m in _chat(where, name, value, columns)]
        return Document(where=where, messages=tuple(messages))
    prompt, text = (*(_string(where, *pair) for pair in named), "")[:2]
    if columns.are_recognised and chosen.prompt == "instruction":
        extra = _string(where, "input", record.get("input"))
        prompt = f"{prompt}\n\n{extra}" if extra else prompt
    if not prompt and isinstance(columns, PromptColumns):
        return Document(where=where)  # an answer to nothing asks nothing
    return Document(where=where, prompt=prompt, text=text)


def _choose(where: str, names: Collection[str], columns: Columns) -> Columns:
    """`columns`, or what is recognised in their stead."""
    if not columns.are_recognised:
        absent = [name for name in columns.needed if name not in names]
        if absent:
            raise _missing(where, absent[0], _key_of(absent[0], columns), names)
        return columns
    there = set(names)
    filled = there
    if isinstance(names, dict):
        filled = {name for name, value in names.items() if value is not None}
    for having in (filled, there):
        for known in known_records(columns):
            if having.issuperset(known.needed):
                return known
    wanted = "prompt" if isinstance(columns, PromptColumns) else columns.text
    raise _missing(where, wanted, wanted, names)


def _key_of(name: str, columns: Columns) -> str:
    """The key of `[corpus.columns]` that a column was mapped by."""
    if columns.prompt:
        return "prompt" if name == columns.prompt else "completion"
    return "messages" if columns.messages else "text"


def _missing(where: str, name: str, key: str, names: Collection[str]) -> ColdstillError:
    have = ", ".join(str(there) for there in names) or "none"
    return ColdstillError(
        f"{where}: missing column {name!r} (have: {have}); map it in the recipe: "
        f'[corpus.columns] {key} = "..."'
    )


def _string(where: str, name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ColdstillError(f"{where}: column {name!r} holds {_shown(value)}, expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a pair; no tokenizer reads it
            raise ColdstillError(
                f"{where}: column {name!r} has half a surrogate pair at character {error.start}, "
                "which is no text; repair or leave out the record"
            ) from error
    return value


def _chat(where: str, name: str, value: Any, columns: Columns) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    messages = _parsed(value)
    if not isinstance(messages, list):
        raise ColdstillError(
            f"{where}: column {name!r} holds {_shown(value)}, expected a list of messages"
        )
    return tuple(
        _message(f"{where}: {name}[{index}]", _parsed(message), columns)
        for index, message in enumerate(messages)
    )


def _parsed(value: Any) -> Any:
    """The value, or what its JSON stands for.

    Tables that cannot hold messages of different shapes hold their JSON; `datasets` 5 does so.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _message(where: str, message: Any, columns: Columns) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ColdstillError(f"{where}: {_shown(message)} is no message, expected an object")
    # A table gives every message the keys of all of them; the null ones were never written.
    left = {key: value for key, value in message.items() if value is not None}
    role_key = _key(left, columns.role, "role", "from")
    content_key = _key(left, columns.content, "content", "value")
    # A null content is a message that says nothing; so is one that only calls a tool.
    says_nothing = columns.content in message or "tool_calls" in left
    if role_key not in left or (content_key not in left and not says_nothing):
        missing = role_key if role_key not in left else content_key
        raise ColdstillError(
            f"{where}: no {missing!r} (have: {', '.join(map(str, left)) or 'none'}); map it in the "
            f'recipe: [corpus.columns] {"role" if missing == role_key else "content"} = "..."'
        )
    role = _string(where, role_key, left.pop(role_key))
    content = _string(where, content_key, left.pop(content_key, None))
    others = {key: _as_json(value) for key, value in left.items()}
    return {"role": _ROLES.get(role, role), "content": content, **others}


def _key(message: Mapping[str, Any], key: str, default: str, other: str) -> str:
    """`key`, or where it is unmapped and absent, the other custom's word for it."""
    return other if key == default and key not in message and other in message else key


def _as_json(value: Any) -> Any:
    """Tables can hold times, decimals and bytes; a chat template and a digest cannot."""
    if isinstance(value, dict):
        return {str(key): _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
