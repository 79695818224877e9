"""A chat as text, with what of it is to be learned, or as a prompt to be answered.

What the template does not write of a chat makes the chat a bad row: nothing of it is left out
silently. Thoughts are the exception, since most templates drop those of earlier turns; they are
counted.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.corpus import BadRowError
from ...data.errors import ColdstillError
from ..libraries import first_line
from .chat_template import ChatTemplate, is_text, misquotes
from .chat_trace import LEVELS, Tinted
from .chat_turns import TurnFinder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ...data.corpus import Document
    from .chat_template import Chat, Spans


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as its template writes it."""

    text: str
    learned: Spans
    """Where the assistant speaks."""
    counts: Counter[str]
    """What of it is not as the row has it, by its name in `CorpusRecord.counts`."""


@dataclass(frozen=True, slots=True)
class _Traced:
    chat: Chat
    text: str
    marked: Spans | None
    tinted: Tinted
    tinted_text: str
    thoughtless: int
    """Messages whose thoughts the template leaves out."""


class ChatRenderer:
    """Renders chats with a tokenizer's template."""

    def __init__(self, tokenizer: Any) -> None:
        """Of this tokenizer. It needs no template until a chat is to be rendered."""
        self._template = ChatTemplate(tokenizer)
        self._turns = TurnFinder(self._template)

    def render(self, document: Document) -> RenderedChat:
        """A whole chat.

        Raises
            BadRowError: the template cannot write this chat, or not all of it
            ColdstillError: there is no template
        """
        found = self._trace(document, prompt=False)
        counts = self._counts(found, prompt=False)
        stretches = found.tinted.stretches(found.tinted_text)
        learned: Spans = []
        for i, message in enumerate(found.chat.messages):
            if message["role"] != "assistant":
                continue
            if _is_masked(message):
                counts["masked_turns"] += 1
                continue
            stretch = stretches.get(i)
            turn = None
            if stretch is not None:
                turn = self._turns.find(found.tinted, i, stretch, found.marked)
            if turn is None:
                raise BadRowError(
                    "unlocated_turns",
                    document.where,
                    f"the chat template writes message {i + 1} (assistant) so that its text "
                    "cannot be told from what stands around it; change it or leave it out",
                )
            learned += turn[0]
            counts["unended_turns"] += not turn[1]
        return RenderedChat(found.text, learned, +counts)

    def ask(self, document: Document) -> RenderedChat:
        """A chat up to its last message that is not the assistant's, as a prompt to be answered.

        Raises
            BadRowError: nothing is asked, or the template cannot write this chat, or not all of it
            ColdstillError: there is no template
        """
        roles = [message["role"] for message in document.messages]
        asked = max((i for i, role in enumerate(roles, 1) if role != "assistant"), default=0)
        if not asked:
            raise BadRowError(
                "unrenderable_chats",
                document.where,
                "the assistant alone speaks, so there is nothing to answer; add the user's turn",
            )
        found = self._trace(replace(document, messages=document.messages[:asked]), prompt=True)
        return RenderedChat(found.text, [], +self._counts(found, prompt=True))

    def _trace(self, document: Document, *, prompt: bool) -> _Traced:
        """A chat in the first form that its template writes completely."""
        if not self._template.is_there:  # that is no fault of the row
            raise ColdstillError(
                f"{document.where}: a chat, but the tokenizer has no chat template; use a chat "
                "model's tokenizer or map the columns to prompt and completion"
            )
        usual, fault = None, None
        for chat in self._template.forms(document):
            usual = usual or chat
            try:
                return self._written(chat, usual, document.where, prompt=prompt)
            except BadRowError as bad:
                fault = fault or bad
        assert fault is not None
        raise fault

    def _written(self, chat: Chat, usual: Chat, where: str, *, prompt: bool) -> _Traced:
        for i, message in enumerate(chat.messages):
            if not is_text(message["content"]):
                raise BadRowError(
                    "unrenderable_chats",
                    where,
                    f"message {i + 1} ({message['role']}) has a content that is not all text, "
                    "expected a string or parts of text; leave out images and other media",
                )
        with _templating(where):
            text, marked = self._template.write(chat, prompt=prompt)
        if misquotes(usual, chat, text):
            raise BadRowError(
                "unrendered_messages",
                where,
                "the chat template does not write the arguments of a tool call as JSON; use a "
                "template that does",
            )
        source = self._template.source(chat)
        for level in range(LEVELS):
            try:
                tinted = Tinted(chat, source, level)
                tinted_text, _ = self._template.write(tinted.chat, prompt=prompt)
            except Exception:  # it looks into what was said: less of that may be replaced
                continue
            if tinted.restore(tinted_text) == text:
                break
        else:
            raise BadRowError("unlocated_turns", where, _unlocated(chat))
        lost, thoughtless = tinted.missing(tinted_text)
        placed = {piece.message for piece in tinted.pieces if len(piece.codes)}
        if any(m["role"] == "assistant" and i not in placed for i, m in enumerate(chat.messages)):
            raise BadRowError("unlocated_turns", where, _unlocated(chat))
        if lost:
            i, kind = lost[0].message, lost[0].kind
            raise BadRowError(
                "unrendered_messages",
                where,
                f"the chat template does not write the {kind} of message {i + 1} "
                f"({chat.role(i)}), or not all of it; use a template that does, change the message",
            )
        messages = len({piece.message for piece in thoughtless})
        return _Traced(chat, text, marked, tinted, tinted_text, messages)

    def _counts(self, found: _Traced, *, prompt: bool) -> Counter[str]:
        """What of a chat its template leaves out without being wrong."""
        counts = Counter(dropped_thoughts=found.thoughtless)
        for name in ("tools", "documents"):
            if not getattr(found.chat, name):
                continue
            try:
                text, _ = self._template.write(replace(found.chat, **{name: ()}), prompt=prompt)
            except Exception:  # it cannot do without them
                continue
            counts[f"unrendered_{name}"] += text == found.text
        counts["dated_chats"] += self._template.writes_date(found.chat)
        return counts


def _is_masked(message: Mapping[str, Any]) -> bool:
    """Whether a row says of an answer that it is not to be learned: `weight: 0`, as OpenAI's
    fine-tuning files have it, or `train: false`, `loss: false`."""
    return any(message.get(key) in (0, False) for key in ("weight", "train", "loss"))


def _unlocated(chat: Chat) -> str:
    for i, message in enumerate(chat.messages):
        if not (str(message["content"] or "").strip() or message.get("tool_calls")):
            return (
                f"message {i + 1} ({message['role']}) is empty, and the chat template does not "
                "show where it stands; leave it out"
            )
    return (
        "the chat template writes other text depending on what the messages say, so what the "
        "assistant said cannot be located; use a template that writes messages as they are"
    )


@contextmanager
def _templating(where: str) -> Iterator[None]:
    """Say of which chat, if its template fails."""
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:  # templates are programs and raise anything
        raise BadRowError(
            "unrenderable_chats",
            where,
            f"the chat template cannot render this chat: {first_line(error)}; repair it",
        ) from error
