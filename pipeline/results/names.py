"""Names of runs and models where several stand side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..recipe.run_folder import Run


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Labels before the names of models: empty for one run, otherwise the shortest ends of the
    folders that differ."""
    if len(runs) == 1:
        return [""]
    paths = [run.root.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            break
    return [visible(end) for end in ends]


def labelled(run_label: str, name: str) -> str:
    """Name of a model in every output."""
    return f"{run_label}/{name}" if run_label else name


def visible(text: str) -> str:
    """A name without control characters, so that it cannot move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
