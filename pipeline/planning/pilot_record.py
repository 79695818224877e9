"""The figures of a pilot, as `pilot.json` in the run keeps them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ...data.errors import ColdstillError
from ...data.files import read_json

if TYPE_CHECKING:
    from ..recipe.tables import Recipe
    from ..recipe.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotRow:
    """Figures of one capture with one codec."""

    head: int
    tail: int
    codec: str | dict[str, Any]
    """The codec as the recipe writes it: a name, or a table of its name and settings."""
    bytes_per_position: float
    kl: float
    """Mean KL(captured || stored) in nats."""
    angle: float
    """Degrees between the summed gradient and the exact one."""
    norm_ratio: float
    """Length of the summed gradient, relative to the exact one."""
    relative_error: float
    """Mean squared error of one position's gradient, relative to the exact gradient."""
    gradient_error: float
    """Distance between the summed gradient and the exact one, relative to the exact one."""

    @property
    def codec_name(self) -> str:
        """The codec without its settings."""
        return str(self.codec["name"]) if isinstance(self.codec, dict) else self.codec


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotRecord:
    settings: dict[str, Any]
    """Recipe settings that the figures depend on, besides head, tail and codec."""
    sequences: int
    positions: int
    tokens_per_second: float
    machine: str
    covered_mass: dict[str, float]
    """Mean probability inside a head, by the size of the head."""
    captures: list[PilotRow]

    def row(self, head: int, tail: int, codec: Any) -> PilotRow | None:
        """The figures of a capture with a codec; None if it was not measured."""
        wanted = (head, tail, json.loads(json.dumps(codec)))
        return next((r for r in self.captures if (r.head, r.tail, r.codec) == wanted), None)

    def own_row(self, recipe: Recipe) -> PilotRow:
        """The figures of the recipe's own capture, which every pilot measures."""
        logits = recipe.logits
        found = self.row(logits.head, logits.tail, logits.codec)
        assert found is not None
        return found

    def recommended(self, recipe: Recipe, budget: float | None) -> PilotRow | None:
        """The capture with the smallest gradient error within the budget; None if none fits.

        budget  bytes per position; None means those of the recipe's own capture
        """
        own = self.own_row(recipe)
        most = own.bytes_per_position if budget is None else budget
        fitting = [r for r in self._of_codec(own) if r.bytes_per_position <= most]
        return min(fitting, key=lambda r: (r.gradient_error, r.bytes_per_position), default=None)

    def smallest(self, own: PilotRow) -> PilotRow:
        """The capture with the fewest bytes, with the codec of the recipe's own row."""
        return min(self._of_codec(own), key=lambda r: r.bytes_per_position)

    def _of_codec(self, own: PilotRow) -> list[PilotRow]:
        return [row for row in self.captures if row.codec == own.codec]


def pilot_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings that a pilot's figures depend on besides head, tail and codec, as a JSON value."""
    table = recipe.model_dump(mode="json")
    return {
        "teacher": table["teacher"],
        "sequence_length": table["corpus"]["sequence_length"],
        "store": table["logits"]["store"],
        "temperatures": table["logits"]["temperatures"],
    }


def read_pilot(work: Work) -> PilotRecord | None:
    """The figures of this run's pilot; None if there was no pilot, or one with another teacher,
    sequence length, store or temperatures.
    """
    path = work.run.pilot
    if not path.exists():
        return None
    try:
        pilot = TypeAdapter(PilotRecord).validate_python(read_json(path))
    except ValidationError as error:
        raise ColdstillError(
            f"{path}: damaged; delete it and run coldstill plan --pilot"
        ) from error
    return pilot if pilot.settings == pilot_settings(work.recipe) else None
