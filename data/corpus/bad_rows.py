"""Rows that cannot be used for training."""

from __future__ import annotations

from ..errors import ColdstillError

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
    """Raise the error: the default for a bad row."""
    raise bad
