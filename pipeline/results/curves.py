"""Learning curves from the metrics that a student's training wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ...stages.config import sequences_in
from ..planning.costs import metrics_lines
from ..recipe.reading import RESOLVED
from .rows import labelled, run_labels, visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..recipe.run_folder import Run, StudentFolder

Points = tuple[tuple[float, float], ...]
MOST_POINTS = 80
"""Points of a curve; neighbouring lines of longer metrics are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One student's training. A point is trained tokens and a mean over some lines of metrics."""

    label_loss: Points
    """Mean -log p(label) on the training text in nats; empty where it was not measured."""
    objective: Points
    """Value of the objective that was minimised."""
    asked: str
    """The objective in words."""
    lines: int
    """Neighbouring lines of metrics that one point is the mean of."""


def read_curves(runs: Sequence[Run]) -> dict[str, Curve]:
    """The curves of all students with metrics, by the names of their models."""
    found = {}
    for run, label in zip(runs, run_labels(runs), strict=True):
        length = _sequence_length(run)
        for name in run.student_names:
            curve = _read_curve(run.student(name), length)
            if curve is not None:
                found[labelled(label, visible(name))] = curve
    return found


def _read_curve(folder: StudentFolder, sequence_length: int) -> Curve | None:
    lines = metrics_lines(folder.metrics)
    if not lines:
        return None
    settings = recorded_table(folder.settings, "student") or {}
    step_tokens = _step_tokens(settings, sequence_length)
    together = -(-len(lines) // MOST_POINTS)
    # older versions wrote the same figure only as a part of the objective
    labels = [line.get("label_loss", line.get("cross_entropy")) for line in lines]
    tokens = [line["step"] * step_tokens for line in lines]
    return Curve(
        label_loss=averaged(tokens, labels, together),
        objective=averaged(tokens, [line.get("loss") for line in lines], together),
        asked=in_words(settings.get("objective")),
        lines=together,
    )


def averaged(places: Sequence[float], values: Sequence[Any], together: int) -> Points:
    """Means of each `together` neighbours; values that are not numbers are left out."""
    pairs = [
        (float(place), float(value))
        for place, value in zip(places, values, strict=True)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    found = []
    for start in range(0, len(pairs), together):
        block = pairs[start : start + together]
        mean = tuple(sum(side) / len(block) for side in zip(*block, strict=True))
        found.append((mean[0], mean[1]))
    return tuple(found)


def in_words(objective: Any) -> str:
    """An objective in words, such as "kl, 0.5 cross_entropy, at temperature 2"."""
    if not isinstance(objective, dict):
        return ""
    parts = []
    for name, weight in objective.items():
        if name in ("temperature", "beta", "skew", "tau", "labels_inside"):
            continue
        if isinstance(weight, dict):
            schedule, value = weight.get("schedule"), weight.get("weight")
            change = f"{weight.get('start')} to " if schedule == "linear" else ""
            parts.append(f"{change}{value} {name} ({schedule})")
        elif isinstance(weight, int | float) and weight > 0:
            parts.append(name if weight == 1 else f"{weight:g} {name}")
    shape = ("beta", "skew", "tau")
    parts += [f"{key} {objective[key]}" for key in shape if objective.get(key) is not None]
    if objective.get("labels_inside"):
        parts.append("labels inside chunks alone")
    temperature = objective.get("temperature", 1.0)
    return ", ".join(parts) + ("" if temperature == 1.0 else f", at temperature {temperature}")


def _step_tokens(settings: dict[str, Any], sequence_length: int) -> int:
    """Tokens of an optimiser step, in whole sequences."""
    train = settings.get("train")
    asked = train.get("batch_tokens") if isinstance(train, dict) else None
    if not isinstance(asked, int) or asked < 1:
        return sequence_length
    return sequences_in(asked, sequence_length) * sequence_length


def _sequence_length(run: Run) -> int:
    length = (recorded_table(run.root / RESOLVED, "recipe") or {}).get("corpus")
    length = length.get("sequence_length") if isinstance(length, dict) else None
    return length if isinstance(length, int) and length > 0 else 1


def recorded_table(path: Path, key: str) -> dict[str, Any] | None:
    """A table of a JSON file; None if it is missing or damaged."""
    try:
        value = read_json(path)
    except ColdstillError:
        return None
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else None
