"""Rows that nothing can be learned from as they are."""

from __future__ import annotations

from ..errors import ColdstillError

REASONS = {
    "incomplete_rows": "rows without a column that is needed",
    "wrong_values": "rows with a value of the wrong type",
    "broken_text": "rows with half a surrogate pair",
    "unknown_roles": "chats with an unknown role",
    "broken_tool_calls": "rows with a tool call or tool that cannot be read",
    "unwanted_answers": "rows whose label says that the completion is not wanted",
    "unanswered_chats": "chats in which the assistant says nothing",
}
"""What is wrong with a record by itself, as a count names it in a sentence."""


class BadRowError(ColdstillError):
    """A row that nothing can be learned from as it is; a recipe may have such rows skipped."""

    def __init__(self, kind: str, where: str, reason: str) -> None:
        """Say why; `kind` is what `CorpusRecord.counts` counts it under."""
        super().__init__(f'{where}: {reason}, or skip such rows with corpus.bad_rows = "skip"')
        self.kind = kind
        self.fault = f"{where}: {reason}"


def refuse(bad: BadRowError) -> None:
    """Raise: what happens to a bad row unless the recipe says otherwise."""
    raise bad
