"""The meaning of a record's columns: as the recipe maps them, or by their usual names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..errors import ColdstillError


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The meaning of a record's columns.

    If no column is mapped, each record is recognised by its columns; the first match wins:
    `messages` or `conversations` (a chat), `prompt` + `completion`, `instruction` + `response` or
    `output` (a non-empty `input` follows the instruction after a blank line), `question` +
    `answer`, `chosen` (the better answer of a preference, as a chat or after a `prompt`, `question`
    or `instruction`), `text`. A null column counts as missing if the other columns match.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    text: str = "text"
    """The column of plain text, in which every token is learned."""
    prompt: str | None = None
    """The column of text that is read but not learned. Needs `completion`, unless the teacher
    answers."""
    completion: str | None = None
    """The column of text that is learned. It follows `prompt` directly, without a separator."""
    messages: str | None = None
    """The column of a chat: a list of messages, each with a role and a content."""
    role: str = "role"
    """The key of a message's role; `from` is recognised, too."""
    content: str = "content"
    """The key of a message's text; `value` is recognised, too."""
    roles: dict[str, str] = field(default_factory=dict)
    """Maps names of roles in the messages to roles: system, developer, user, assistant, tool,
    function_call (an assistant's tool call as JSON), or any other role of the chat template.
    The usual names need no entry."""
    system: str = "system"
    """The column of a system message for a chat; `system_prompt` is recognised, too. Before a
    recognised prompt its text is followed by a blank line."""
    tools: str = "tools"
    """The column of a chat's tools, for the chat template; `functions` is recognised, too."""
    documents: str = "documents"
    """The column of the documents that a chat refers to, for the chat template."""

    def __post_init__(self) -> None:
        if self.completion is not None and self.prompt is None:
            raise _unmapped("prompt")
        if empty := [name for name, role in self.roles.items() if not role.strip()]:
            raise ColdstillError(
                f"corpus.columns.roles: {empty[0]!r} is mapped to an empty role; give a role"
            )
        mapped = {
            "text": self.text != "text",
            "prompt": self.prompt is not None,
            "messages": self.messages is not None,
        }
        if sum(mapped.values()) > 1:
            both = " and ".join(name for name, is_mapped in mapped.items() if is_mapped)
            raise ColdstillError(f"corpus.columns: {both} are both mapped; map only one of them")

    def expect_answers(self) -> None:
        """Raise ColdstillError if a prompt is mapped without a completion."""
        if self.prompt is not None and self.completion is None:
            raise _unmapped("completion")

    def for_prompts(self) -> PromptColumns:
        """The same columns for a corpus of prompts."""
        return PromptColumns(**asdict(self))

    @property
    def are_recognised(self) -> bool:
        """Whether no column is mapped, so that each record is recognised by its columns."""
        return self.text == "text" and self.prompt is None and self.messages is None

    def beside(self, kind: str) -> tuple[str, ...]:
        """The columns that may hold a row's `system`, `tools` or `documents`, by priority.

        A column named in the recipe is the only one. An empty name stands for no column.
        """
        name: str = getattr(self, kind)
        usual = (kind, *_OTHER_NAMES.get(kind, ()))
        return usual if name == kind else (name,) if name else ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a record must have."""
        if self.messages is not None:
            return (self.messages,)
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return (self.text,)

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that are used if a record has them."""
        return ()


class PromptColumns(Columns):
    """The columns of a corpus of prompts, which need no answers."""

    __slots__ = ()

    def expect_answers(self) -> None:
        """Do nothing: the teacher answers."""

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.messages or self.prompt or self.text,)

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.completion is None else (self.completion,)


CHOSEN = "chosen"
"""The column of the better of two answers; the other one is not used."""
LABEL = "label"
"""The column that marks a single answer as wanted or not: true or false."""
BESIDE = ("system", "tools", "documents")
"""The fields of `Columns` for values beside the messages of a row."""
_OTHER_NAMES = {"system": ("system_prompt",), "tools": ("functions",)}

_RECOGNISED = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(prompt="prompt", completion="completion"),
    Columns(prompt="instruction", completion="response"),
    Columns(prompt="instruction", completion="output"),
    Columns(prompt="question", completion="answer"),
    Columns(prompt="prompt", completion=CHOSEN),
    Columns(prompt="question", completion=CHOSEN),
    Columns(prompt="instruction", completion=CHOSEN),
    Columns(messages=CHOSEN),
    Columns(),
)
_RECOGNISED_PROMPTS = (
    *_RECOGNISED[:-1],
    *(PromptColumns(prompt=name) for name in ("prompt", "instruction", "question")),
    _RECOGNISED[-1],
)


def known_records(columns: Columns) -> tuple[Columns, ...]:
    """The kinds of records that are recognised, by priority."""
    return _RECOGNISED_PROMPTS if isinstance(columns, PromptColumns) else _RECOGNISED


def _unmapped(key: str) -> ColdstillError:
    return ColdstillError(
        f"corpus.columns: {key} is not mapped; map prompt and completion together, or text alone"
        + (" (a prompt alone is for teacher.generate)" if key == "completion" else "")
    )
