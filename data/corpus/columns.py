"""Which columns of a record hold what: as the recipe maps them, or as they are usually called."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..errors import ColdstillError


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a record hold what.

    When none is mapped, each record is recognised by the columns it has; the first match wins:
    `messages` or `conversations` (a chat), `prompt` + `completion`, `instruction` + `response` or
    `output` (a non-empty `input` follows the instruction after a blank line), `question` +
    `answer`, `chosen` (the better answer of a preference, as a chat or after a `prompt`, `question`
    or `instruction`), `text`. A null column counts as absent as long as the others match something.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    text: str = "text"
    """Plain text, learned whole."""
    prompt: str | None = None
    """Text that is read but not learned; needs `completion`, unless the teacher answers it."""
    completion: str | None = None
    """Text that is learned, directly after `prompt`: nothing is put between them."""
    messages: str | None = None
    """A list of messages, each with a role and a content."""
    role: str = "role"
    """The key of a message that says who speaks; `from` is understood too."""
    content: str = "content"
    """The key of a message that holds what is said; `value` is understood too."""
    roles: dict[str, str] = field(default_factory=dict)
    """Names of roles in the messages, each with the role that it means: system, developer, user,
    assistant, tool, function_call (an assistant's tool call as JSON), or one that only the chat
    template knows. The usual names need none."""
    system: str = "system"
    """Text for a system message before the chat; `system_prompt` is understood too. Before a
    prompt that is recognised it stands with a blank line between."""
    tools: str = "tools"
    """The tools of a chat for its template; `functions` is understood too."""
    documents: str = "documents"
    """The documents that a chat refers to, for its template."""

    def __post_init__(self) -> None:
        if self.completion is not None and self.prompt is None:
            raise _unmapped("prompt")
        if empty := [name for name, role in self.roles.items() if not role.strip()]:
            raise ColdstillError(
                f"corpus.columns.roles: {empty[0]!r} means no role; give the name of one"
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
        """Raise ColdstillError if a prompt is mapped and nothing that follows it."""
        if self.prompt is not None and self.completion is None:
            raise _unmapped("completion")

    def for_prompts(self) -> PromptColumns:
        """The same columns where only prompts are wanted."""
        return PromptColumns(**asdict(self))

    @property
    def are_recognised(self) -> bool:
        """Whether nothing is mapped, so that each record tells by its columns what it is."""
        return self.text == "text" and self.prompt is None and self.messages is None

    def beside(self, kind: str) -> tuple[str, ...]:
        """The columns that may hold a row's `system`, `tools` or `documents`, the first one first.

        A column named in the recipe is the only one; an empty name stands for none.
        """
        name: str = getattr(self, kind)
        usual = (kind, *_OTHER_NAMES.get(kind, ()))
        return usual if name == kind else (name,) if name else ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there."""
        if self.messages is not None:
            return (self.messages,)
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return (self.text,)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are used where they are there."""
        return ()


class PromptColumns(Columns):
    """Columns of a corpus of prompts: what was once answered to them may be missing."""

    __slots__ = ()

    def expect_answers(self) -> None:
        """Nothing: the teacher answers."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there."""
        return (self.messages or self.prompt or self.text,)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are used where they are there."""
        return () if self.completion is None else (self.completion,)


CHOSEN = "chosen"
"""The column of the better one of two answers; the other one is not used."""
LABEL = "label"
"""The column that says of one answer alone whether it is wanted: true or false."""
BESIDE = ("system", "tools", "documents")
"""What a row may hold beside its messages, by the fields of `Columns`."""
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
    """What records are recognised as, the first match first."""
    return _RECOGNISED_PROMPTS if isinstance(columns, PromptColumns) else _RECOGNISED


def _unmapped(key: str) -> ColdstillError:
    return ColdstillError(
        f"corpus.columns: {key} is not mapped; map prompt and completion together, or text alone"
        + (" (a prompt alone is for teacher.generate)" if key == "completion" else "")
    )
