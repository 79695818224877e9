"""What a pilot of this run has measured, as its file keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json

if TYPE_CHECKING:
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe


def pilot_settings(recipe: Recipe) -> dict[str, Any]:
    """What a pilot's figures depend on besides head, tail and codec, as a JSON value."""
    table = recipe.model_dump(mode="json")
    return {
        "teacher": table["teacher"],
        "sequence_length": table["corpus"]["sequence_length"],
        "store": table["logits"]["store"],
        "temperatures": table["logits"]["temperatures"],
    }


def read_pilot(recipe: Recipe, run: Run) -> dict[str, Any] | None:
    """What a pilot of this run measured, or None: there was none, or of another teacher, sequence
    length, store or temperatures.

    Raises
        ColdstillError: the file is damaged
    """
    if not run.pilot.exists():
        return None
    pilot = read_json(run.pilot)
    keys = {"settings", "tokens_per_second", "captures", "covered_mass"}
    rows = pilot.get("captures") if isinstance(pilot, dict) and keys <= pilot.keys() else None
    row_keys = {"head", "tail", "codec", "bytes_per_position"}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row_keys <= row.keys() for row in rows
    ):
        raise ColdstillError(f"{run.pilot}: damaged; delete it and run coldstill plan --pilot")
    same = pilot["settings"] == pilot_settings(recipe)
    return dict(pilot) if same else None
