"""What was measured before, by a pilot, a store or a student: how long the rest will take."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from ...data.files import parse_json
from ...data.places.opening import place_at
from ...data.store.layout import MEASUREMENTS
from .pilot_record import read_pilot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...data.prepared import Split
    from ...stages.config import TrainConfig
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe
    from .sizes import StoreSize

_LINES = 10
"""Lines of a student's metrics that its speed is the median of: the last ones."""


def capture_speeds(recipe: Recipe, run: Run) -> dict[Split, float | None]:
    """Tokens a second of the teacher, by the split it will read: of that split's own store where it
    was measured, else of the other's, else of the pilot."""
    folders: dict[Split, str | Path] = {"train": run.logits, "heldout": run.heldout}
    own = {split: _stores_speed(folder) for split, folder in folders.items()}
    pilot = read_pilot(recipe, run)
    spare = (
        own["train"] or own["heldout"] or (_speed(pilot, "tokens_per_second") if pilot else None)
    )
    return {split: speed or spare for split, speed in own.items()}


def capture_hours(
    stores: Mapping[Split, StoreSize], speeds: Mapping[Split, float | None], sequence_length: int
) -> float | None:
    """What both stores still need, or None where nothing was measured."""
    total = 0.0
    for split, store in stores.items():
        speed = speeds[split]
        if store.sequences_missing and speed is None:
            return None
        if store.sequences_missing and speed is not None:
            total += store.sequences_missing * sequence_length / speed / 3600
    return total


def training_hours(config: TrainConfig, folder: Path, sequence_length: int) -> float | None:
    """What the steps that are left will take, at the speed of the last ones; None if there are
    none."""
    lines = metrics_lines(folder / "metrics.jsonl")
    speeds = [speed for line in lines[-_LINES:] if (speed := _speed(line, "tokens_per_second"))]
    if not speeds:
        return None
    left = max(0, config.steps - int(lines[-1]["step"]))
    tokens = left * max(1, config.batch_tokens // sequence_length) * sequence_length
    return tokens / statistics.median(speeds) / 3600


def _stores_speed(address: str | Path) -> float | None:
    place = place_at(address)
    if not place.exists(MEASUREMENTS):
        return None
    measured = parse_json(place.read(MEASUREMENTS), place.path(MEASUREMENTS))
    return _speed(measured, "capture_tokens_per_second")


def _speed(record: Any, key: str) -> float | None:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value > 0 else None


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """Its whole lines; a killed training leaves half a one."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
