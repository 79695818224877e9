"""Runs with figures and metrics but without models: what the tests of `compare` look at."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BINS = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A student as it would be after training and evaluation."""

    name: str
    loss: float = 5.0
    parameters: int = 926_336
    cached: float | None = 42.3
    steps: int = 40
    batch_tokens: int = 4096
    old: bool = False
    """Whether its figures and metrics are those of a version that knew less."""


def calibration(sharpness: float = 1.2) -> list[dict[str, Any]]:
    """Bins of a model that is a little too sure; two of them are empty."""
    found: list[dict[str, Any]] = []
    for number in range(BINS):
        confidence = (number + 0.5) / BINS
        count = 0 if number in (3, 17) else int(4000 * math.exp(-number / 5)) + 40
        known = {"confidence": confidence, "accuracy": confidence**sharpness}
        found.append({"count": count, **(known if count else dict.fromkeys(known))})
    return found


def figures(name: str, loss: float, parameters: int, **more: Any) -> dict[str, Any]:
    """What `evaluate` writes."""
    return {
        "name": name,
        "role": "student",
        "parameters": parameters,
        "bytes": 4 * parameters,
        "positions": 108_179,
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": loss - 4.9,
        "agreement": 3.0 / loss,
        "accuracy": 0.2,
        "acceptance": 3.5 / loss,
        "ece": 0.019,
        "calibration": calibration(),
        "tokens_per_second": 1e11 / parameters,
        "peak_memory_bytes": 60 * parameters,
        "machine": "2 CPU threads",
        "heldout": "f00d",
        **more,
    }


def write_run(
    runs: Path, name: str, students: Sequence[Made], heldout: str = "f00d", speed: float = 9e3
) -> Path:
    """A run's folder; `heldout` is the hash of the store it was measured on."""
    root = runs / name
    recipe = {
        "name": name if name.isalnum() else "made",
        "corpus": {"files": ["texts"], "sequence_length": 1024},
        "teacher": {"model": "org/teacher"},
        "students": {},
    }
    _write(root / "recipe.resolved.json", {"recipe": recipe, "base": str(runs)})
    (root / "recipe.toml").write_text("", encoding="utf-8")
    own = {"heldout": heldout, "role": "teacher", "tokens_per_second": speed}
    teacher = figures("teacher", 4.9, 34_588_160, **own)
    _write(root / "teacher.evaluation.json", {**teacher, "kl": 0.0, "agreement": 1.0})
    for student in students:
        _write_student(root / "students" / student.name, student, heldout)
    return root


def _write_student(folder: Path, student: Made, heldout: str) -> None:
    objective = {"kl": float(student.cached != 0), "cross_entropy": float(student.cached == 0)}
    train = {"batch_tokens": student.batch_tokens, "steps": student.steps}
    _write(folder / "student.json", {"student": {"objective": objective, "train": train}})
    found = figures(student.name, student.loss, student.parameters, heldout=heldout)
    found["cached_bytes_per_position"] = student.cached
    newer = ("calibration", "cached_bytes_per_position")
    kept = {key: value for key, value in found.items() if not student.old or key not in newer}
    _write(folder / "evaluation.json", kept)
    lines = []
    for step in range(1, student.steps + 1):
        label_loss = label_loss_at(student, step)
        line = {"step": step, "loss": label_loss - 2.0, "label_loss": label_loss}
        if student.old:
            del line["label_loss"]
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def label_loss_at(student: Made, step: int) -> float:
    """What its metrics say."""
    return student.loss + 3.0 * math.exp(-step / 8)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
