"""Rows that nothing can be learned from as they are."""

from __future__ import annotations

from ...data.errors import ColdstillError


class BadRowError(ColdstillError):
    """A document that nothing can be learned from as it is; a recipe may have such skipped."""

    def __init__(self, kind: str, where: str, reason: str) -> None:
        """Say why; `kind` is what `CorpusRecord.counts` counts it under."""
        super().__init__(f'{where}: {reason}, or skip such rows with corpus.bad_rows = "skip"')
        self.kind = kind


def refuse(bad: BadRowError) -> None:
    """What becomes of a bad row unless the recipe says otherwise."""
    raise bad
