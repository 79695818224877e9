"""Turns a record (a JSON object or a table row) into a `Document`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError
from .columns import BESIDE, CHOSEN, LABEL, PromptColumns, known_records
from .document import BadRowError, Document, listed, parsed, shown
from .messages import read_chat, read_string, read_texts, read_tools

if TYPE_CHECKING:
    from collections.abc import Collection

    from .columns import Columns


@dataclass(slots=True)
class Reading:
    """Counts of records and unused columns, filled while records are read."""

    records: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    """Number of records in which a column had a value that was not used, by column."""

    def note(self) -> str | None:
        """A sentence that names unused columns; None if all were used."""
        if not self.unused:
            return None
        names = []
        for name, count in sorted(self.unused.items()):
            some = f" (in {count:,} of {self.records:,} rows)" if count < self.records else ""
            names.append(listed([name]) + some)
        return f"columns not used: {', '.join(names)}"


def used_columns(where: str, names: Collection[str], columns: Columns) -> list[str]:
    """The columns of a table that documents can be made of; the others are not read. Raises
    ColdstillError if a necessary column is missing."""
    chosen = _choose(where, names, columns)
    if columns.are_recognised:
        used = {"input", CHOSEN, LABEL}.union(*(known.needed for known in known_records(columns)))
    else:
        used = {*chosen.needed, *chosen.optional}
    used.update(name for kind in BESIDE for name in columns.beside(kind))
    order = list(names) if columns.are_recognised else [*chosen.needed, *chosen.optional, *names]
    return [name for name in dict.fromkeys(order) if name in used and name in names]


def to_document(
    where: str, record: Any, columns: Columns, reading: Reading | None = None
) -> Document:
    """The document of a record; empty if its values are null or empty.

    reading  receives the columns that have a value and are not used

    Raises
        BadRowError: the record is not an object, a column is missing or has a wrong type, or its
            answer is not wanted
    """
    if not isinstance(record, dict):
        fault = f'{shown(record)} is not a record, expected an object such as {{"text": "..."}}'
        raise BadRowError("wrong_values", where, f"{fault}; repair it")
    try:
        chosen = _choose(where, record, columns)
    except ColdstillError as error:
        reason = str(error).removeprefix(f"{where}: ")
        raise BadRowError("incomplete_rows", where, reason) from error
    row = _Row(where, record, columns, chosen)
    document = row.document()
    if reading is not None:
        reading.records += 1
        there = (name for name, value in record.items() if value not in (None, "", [], {}))
        reading.unused.update(str(name) for name in there if name not in row.used)
    return document


def expect_answer(document: Document) -> None:
    """Raise BadRowError if a document is a chat without a turn of the assistant."""
    roles = dict.fromkeys(message["role"] for message in document.messages)
    if roles and "assistant" not in roles:
        raise BadRowError(
            "unanswered_chats",
            document.where,
            f"this chat has no answer of the assistant (only {', '.join(roles)}), so nothing "
            "can be learned; add the answer, or let the teacher answer with teacher.generate",
        )


@dataclass(slots=True)
class _Row:
    """A record, its recognised kind, and the columns that were used."""

    where: str
    record: dict[str, Any]
    columns: Columns
    chosen: Columns
    used: set[str] = field(default_factory=set)

    def document(self) -> Document:
        self._expect_wanted()
        names = [n for n in self.chosen.optional if self.record.get(n) is not None]
        names = [*self.chosen.needed, *names]
        self.used.update(names)
        values = [self.record[name] for name in names]
        if self.chosen.messages is not None:
            return self._chat(names[0])
        if self.chosen.prompt is None:
            return Document(where=self.where, text=self._string(names[0]))
        if all(isinstance(value, list) for value in values) or (
            CHOSEN in names and any(map(self._are_messages, values))
        ):
            return self._of_messages(self._joined(names))
        return self._pair(names)

    def _expect_wanted(self) -> None:
        """Refuse a completion that its row marks as unwanted.

        Unpaired preferences (KTO) have a `label` of true or false beside prompt and completion.
        """
        is_pair = self.chosen.prompt is not None and self.chosen.completion is not None
        only_asked = isinstance(self.columns, PromptColumns)
        if only_asked or not (self.columns.are_recognised and is_pair):
            return
        label = self.record.get(LABEL)
        if label is False:
            raise BadRowError(
                "unwanted_answers",
                self.where,
                f"column {LABEL!r} is false, so its completion is not wanted; leave the row "
                "out, map prompt and completion in [corpus.columns] to learn all completions",
            )
        if label is True:
            self.used.add(LABEL)

    def _pair(self, names: list[str]) -> Document:
        prompt, text = (*(self._string(name) for name in names), "")[:2]
        if self.columns.are_recognised and self.chosen.prompt == "instruction":
            extra = self._string("input")
            prompt = f"{prompt}\n\n{extra}" if extra else prompt
        if not prompt and isinstance(self.columns, PromptColumns):
            return Document(where=self.where)  # an answer without a prompt
        system = ""
        if self.columns.are_recognised or self.columns.system != "system":
            name = self._beside("system")
            system = self._string(name) if name else ""
            prompt = f"{system}\n\n{prompt}" if system else prompt
        return Document(where=self.where, prompt=prompt, text=text, system=system)

    def _chat(self, name: str) -> Document:
        value = self.record[name]
        if name == CHOSEN and self.columns.are_recognised and isinstance(parsed(value), str):
            raise BadRowError(
                "incomplete_rows",
                self.where,
                f"column {CHOSEN!r} holds a text and no column holds its prompt; map that in the "
                f'recipe: [corpus.columns] prompt = "...", completion = "{CHOSEN}", or learn all '
                f'of the text: text = "{CHOSEN}"',
            )
        messages = list(self._messages(name))
        open_end = bool(messages) and messages[-1]["role"] != "assistant"
        if open_end and self.columns.are_recognised and self.record.get(CHOSEN) is not None:
            self.used.add(CHOSEN)
            answer = self._messages(CHOSEN, "assistant")
            messages = list(answer) if _is_whole(answer) else [*messages, *answer]
        return self._of_messages(messages)

    def _joined(self, names: list[str]) -> list[dict[str, Any]]:
        """The messages of a prompt and a completion, at least one of which is a list."""
        prompt = self._messages(names[0], "user")
        answer = self._messages(names[1], "assistant") if len(names) > 1 else ()
        # The better answer of a preference is often the whole chat.
        return list(answer) if CHOSEN in names and _is_whole(answer) else [*prompt, *answer]

    def _of_messages(self, messages: list[dict[str, Any]]) -> Document:
        found = Document(where=self.where, messages=tuple(messages))
        if not messages:
            return found
        name = self._beside("system")
        if name and messages[0]["role"] not in ("system", "developer"):
            system = {"role": "system", "content": self._string(name)}
            found = replace(found, messages=(system, *messages))
        elif name and messages[0]["content"] != self.record[name]:
            self.used.discard(name)  # the chat has its own system message
        if name := self._beside("tools"):
            tools = read_tools(f"{self.where}: column {name!r}", self.record[name])
            found = replace(found, tools=tools)
        if name := self._beside("documents"):
            texts = read_texts(f"{self.where}: column {name!r}", self.record[name])
            found = replace(found, documents=texts)
        return found

    def _messages(self, name: str, role: str = "") -> tuple[dict[str, Any], ...]:
        """The messages of a column; with `role`, a text or a single message stands for a list."""
        value = self.record[name]
        if role and value and not self._are_messages(value):
            value = [{"role": role, "content": value}]
            return read_chat(self.where, name, value, _usual_keys(self.columns))
        value = parsed(value)
        value = [value] if role and isinstance(value, dict) else value
        return read_chat(self.where, name, value, self.columns)

    def _are_messages(self, value: Any) -> bool:
        """Whether a value is messages rather than a text, which may be JSON such as `[1, 2]`."""
        if not isinstance(value, str):
            return isinstance(value, list | dict)
        found = parsed(value)
        items = found if isinstance(found, list) else [found]
        roles = {self.columns.role, "from"}
        return bool(items) and all(isinstance(i, dict) and roles.intersection(i) for i in items)

    def _string(self, name: str) -> str:
        self.used.add(name)
        return read_string(self.where, name, self.record.get(name))

    def _beside(self, kind: str) -> str | None:
        """The column with the `system`, `tools` or `documents` of the row; None if all are
        empty."""
        for name in self.columns.beside(kind):
            if self.record.get(name):
                self.used.add(name)
                return name
        return None


def _usual_keys(columns: Columns) -> Columns:
    return replace(columns, role="role", content="content")


def _is_whole(messages: Collection[dict[str, Any]]) -> bool:
    """Whether messages are a whole chat, not only an answer."""
    return any(message["role"] in ("user", "system", "developer") for message in messages)


def _choose(where: str, names: Collection[str], columns: Columns) -> Columns:
    """`columns` if they are mapped, otherwise the recognised kind of record."""
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
    """The key of `[corpus.columns]` that maps a column."""
    if columns.prompt:
        return "prompt" if name == columns.prompt else "completion"
    return "messages" if columns.messages else "text"


def _missing(where: str, name: str, key: str, names: Collection[str]) -> ColdstillError:
    return ColdstillError(
        f"{where}: missing column {name!r} (have: {listed(names)}); map it in the recipe: "
        f'[corpus.columns] {key} = "..."'
    )
