"""Renders a chat as text with the spans to learn, or as a prompt for the teacher.

A chat is a bad row if the template leaves out any part of it. Thoughts are the exception, because
most templates drop those of earlier turns; they are counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.corpus.document import BadRowError
from ...data.errors import ColdstillError, first_line
from .chat_template import ChatTemplate, is_text, misquotes
from .chat_trace import LEVELS, TracedChat
from .chat_turns import TurnFinder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.corpus.document import Document
    from .chat_template import Chat, Spans


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as its template writes it."""

    text: str
    learned: Spans
    counts: Counter[str]
    """Differences from the row, by their names in `CorpusRecord.counts`."""


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A chat and its text, with the same for the traced chat."""

    chat: Chat
    text: str
    marked: Spans | None
    """Spans that the template marks as the assistant's; None if it marks nothing."""
    traced: TracedChat
    traced_text: str
    thoughtless: int
    """Number of messages whose thoughts the template leaves out."""


class ChatRenderer:
    """Renders chats with a tokenizer's template."""

    def __init__(self, tokenizer: Any) -> None:
        self._template = ChatTemplate(tokenizer)
        self._turns = TurnFinder(self._template)

    def render(self, document: Document) -> RenderedChat:
        """The text of a chat, with the assistant's turns to learn.

        Raises
            BadRowError: the template cannot write this chat completely
            ColdstillError: the tokenizer has no template
        """
        found = self._trace(document, prompt=False)
        counts = self._counts(found, prompt=False)
        spans = found.traced.spans(found.traced_text)
        learned: Spans = []
        for i, message in enumerate(found.chat.messages):
            if message["role"] != "assistant":
                continue
            if _is_masked(message):
                counts["masked_turns"] += 1
                continue
            span = spans.get(i)
            chat = found.traced.chat
            turn = None if span is None else self._turns.find(chat, i, span, found.marked)
            if turn is None:
                raise BadRowError(
                    "unlocated_turns",
                    document.where,
                    f"in the output of the chat template the text of message {i + 1} (assistant) "
                    "cannot be separated from the text around it; change it or leave it out",
                )
            spans_of_turn, is_ended = turn
            learned += spans_of_turn
            counts["unended_turns"] += not is_ended
        return RenderedChat(found.text, learned, +counts)

    def ask(self, document: Document) -> RenderedChat:
        """A chat up to its last message that is not the assistant's, as a prompt.

        Raises
            BadRowError: the chat has only assistant messages, or the template cannot write it
                completely
            ColdstillError: the tokenizer has no template
        """
        roles = [message["role"] for message in document.messages]
        asked = max((i for i, role in enumerate(roles, 1) if role != "assistant"), default=0)
        if not asked:
            raise BadRowError(
                "unrenderable_chats",
                document.where,
                "it has only messages of the assistant and nothing to answer; add the user's turn",
            )
        found = self._trace(replace(document, messages=document.messages[:asked]), prompt=True)
        return RenderedChat(found.text, [], +self._counts(found, prompt=True))

    def _trace(self, document: Document, *, prompt: bool) -> _Rendering:
        """The chat in the first form that its template writes completely."""
        if not self._template.exists:  # not the fault of the row
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

    def _written(self, chat: Chat, usual: Chat, where: str, *, prompt: bool) -> _Rendering:
        for i, message in enumerate(chat.messages):
            if not is_text(message["content"]):
                raise BadRowError(
                    "unrenderable_chats",
                    where,
                    f"message {i + 1} ({message['role']}) has a content that is not all text, "
                    "expected a string or parts of text; leave out images and other media",
                )
        try:
            text, marked = self._template.write(chat, prompt=prompt)
        except ColdstillError:
            raise
        except Exception as error:  # templates are programs and raise any class
            raise BadRowError(
                "unrenderable_chats",
                where,
                f"the chat template cannot render this chat: {first_line(error)}; repair it",
            ) from error
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
                traced = TracedChat(chat, source, level)
                traced_text, _ = self._template.write(traced.chat, prompt=prompt)
            except Exception:  # the template searches messages for text that was replaced
                continue
            if traced.restore(traced_text) == text:
                break
        else:
            raise BadRowError("unlocated_turns", where, _unlocated(chat))
        lost, thoughtless = traced.missing(traced_text)
        placed = {piece.message for piece in traced.pieces if len(piece.codes)}
        if any(m["role"] == "assistant" and i not in placed for i, m in enumerate(chat.messages)):
            raise BadRowError("unlocated_turns", where, _unlocated(chat))
        if lost:
            i, kind = lost[0].message, lost[0].kind
            raise BadRowError(
                "unrendered_messages",
                where,
                f"the chat template does not write the {kind} of message {i + 1} "
                f"({chat.role(i)}) completely; use a template that does, change the message",
            )
        messages = len({piece.message for piece in thoughtless})
        return _Rendering(chat, text, marked, traced, traced_text, messages)

    def _counts(self, found: _Rendering, *, prompt: bool) -> Counter[str]:
        """Parts of a chat that its template may leave out, by name."""
        counts = Counter(dropped_thoughts=found.thoughtless)
        for name in ("tools", "documents"):
            if not getattr(found.chat, name):
                continue
            try:
                text, _ = self._template.write(replace(found.chat, **{name: ()}), prompt=prompt)
            except Exception:  # the template requires them
                continue
            counts[f"unrendered_{name}"] += text == found.text
        counts["dated_chats"] += self._template.writes_date(found.chat)
        return counts


def _is_masked(message: Mapping[str, Any]) -> bool:
    """Whether a message is marked as not to be learned.

    The marks are `weight: 0` (in OpenAI's fine-tuning files), `train: false` and `loss: false`.
    """
    return any(message.get(key) in (0, False) for key in ("weight", "train", "loss"))


def _unlocated(chat: Chat) -> str:
    for i, message in enumerate(chat.messages):
        if not (str(message["content"] or "").strip() or message.get("tool_calls")):
            return (
                f"message {i + 1} ({message['role']}) is empty, and its place in the output of the "
                "chat template is unknown; leave it out"
            )
    return (
        "the text that the chat template writes depends on the content of the messages, so the "
        "answers cannot be located; use a template that writes messages as they are"
    )
