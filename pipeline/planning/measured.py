"""Time that is left of each stage, from speeds measured by a pilot, a store or a student."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from ...data.files import parse_json
from ...data.places.place import place_at
from ...data.store.layout import MEASUREMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...data.prepared import Split
    from ...stages.config import TrainConfig
    from ..recipe.run_folder import Run
    from .pilot_record import PilotRecord
    from .sizes import StoreSize

_LINES = 10
"""The speed of a student is the median of this many last lines of its metrics."""


def capture_speeds(run: Run, pilot: PilotRecord | None) -> dict[Split, float | None]:
    """Tokens per second of the teacher for each split: measured on the store of that split, on the
    other store, or by the pilot."""
    train, heldout = _store_speed(run.logits), _store_speed(run.heldout)
    other = train or heldout or (None if pilot is None else pilot.tokens_per_second)
    return {"train": train or other, "heldout": heldout or other}


def capture_hours(
    stores: Mapping[Split, StoreSize], speeds: Mapping[Split, float | None], sequence_length: int
) -> float | None:
    """Hours for the missing sequences of both stores; None without a measured speed."""
    total = 0.0
    for split, store in stores.items():
        if store.sequences_missing:
            speed = speeds[split]
            if speed is None:
                return None
            total += store.sequences_missing * sequence_length / speed / 3600
    return total


def training_hours(config: TrainConfig, folder: Path, sequence_length: int) -> float | None:
    """Hours for the remaining steps at the speed of the last ones; None without metrics."""
    lines = metrics_lines(folder / "metrics.jsonl")
    speeds = [speed for line in lines[-_LINES:] if (speed := _speed(line.get("tokens_per_second")))]
    if not speeds:
        return None
    left = max(0, config.steps - int(lines[-1]["step"]))
    tokens = left * max(1, config.batch_tokens // sequence_length) * sequence_length
    return tokens / statistics.median(speeds) / 3600


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a killed training leaves an incomplete last line."""
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


def _store_speed(address: str | Path) -> float | None:
    place = place_at(address)
    if not place.exists(MEASUREMENTS):
        return None
    measured = parse_json(place.read(MEASUREMENTS), place.path(MEASUREMENTS))
    value = measured.get("capture_tokens_per_second") if isinstance(measured, dict) else None
    return _speed(value)


def _speed(value: Any) -> float | None:
    """A positive number as a speed, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value > 0 else None
