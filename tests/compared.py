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
QUALITY: dict[str, Any] = {
    "name": "a-long-name",
    "parameters": 1234567,
    "cached_bytes_per_position": 42.34,
    "loss": 1.23456,
    "perplexity": 3.4567,
    "bits_per_byte": 1.5,
    "kl": 0.01,
    "agreement": 0.5,
    "acceptance": 0.75,
    "ece": 0.01234,
}
"""Every figure of the first table, and"""
SPEED: dict[str, Any] = {
    "batch": 1,
    "prefill_tokens_per_second": 12345.6,
    "first_token_seconds": 0.0456,
    "token_seconds": 0.00123,
    "token_seconds_p95": 0.00234,
    "memory_bytes": None,
    "decode_tokens_per_second": 813.0,
}
"""of writing one text; nobody knows in how much memory."""
ROW: dict[str, Any] = {
    **QUALITY, "dtype": "bf16", "bytes": 2_500_000, "flops_per_token": 2_469_134,
    "generation": [SPEED],
}  # fmt: skip
"""A row for both tables."""


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
    exports: tuple[str, ...] = ()
    """Formats it was exported to."""


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
        "dtype": "fp32",
        "flops_per_token": 2 * parameters,
        "generation": generation(parameters),
        "machine": "2 CPU threads",
        "runtime": "torch 2.13.0",
        "weights": f"weights of {name}",
        "heldout": "f00d",
        **more,
    }


def generation(parameters: int, batches: Sequence[int] = (1, 8)) -> list[dict[str, Any]]:
    """How fast a model of that size writes, and in how much memory."""
    seconds = 1e-3 * math.sqrt(parameters / 1e5)
    return [
        {
            "batch": batch,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "first_token_seconds": 4 * seconds * batch,
            "prefill_tokens_per_second": 32 / seconds,
            "token_seconds": seconds * math.sqrt(batch),
            "token_seconds_p95": 1.2 * seconds * math.sqrt(batch),
            "decode_tokens_per_second": math.sqrt(batch) / seconds,
            "memory_bytes": 5 * parameters + 40_000 * batch,
        }
        for batch in batches
    ]


def write_run(
    runs: Path, name: str, students: Sequence[Made], heldout: str = "f00d", size: int = 34_588_160
) -> Path:
    """A run's folder.

    heldout  the hash of the store it was measured on
    size     parameters that the teacher's speed is that of
    """
    root = runs / name
    recipe = {
        "name": name if name.isalnum() else "made",
        "corpus": {"files": ["texts"], "sequence_length": 1024},
        "teacher": {"model": "org/teacher"},
        "students": {},
    }
    _write(root / "recipe.resolved.json", {"recipe": recipe, "base": str(runs)})
    (root / "recipe.toml").write_text("", encoding="utf-8")
    own = {"heldout": heldout, "role": "teacher", "generation": generation(size)}
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
    for name in student.exports:
        _write(folder / "exports" / name / "export.json", export_record(found, name))
    lines = []
    for step in range(1, student.steps + 1):
        label_loss = label_loss_at(student, step)
        line = {"step": step, "loss": label_loss - 2.0, "label_loss": label_loss}
        if student.old:
            del line["label_loss"]
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


FORMATS = ("hf", "onnx", "onnx-int8", "gguf-f16", "gguf-q8_0", "torchao-int8")
"""Of exports, in the order of the table."""
RUNTIMES = {"hf": "torch 2.13.0", "onnx": "onnxruntime 1.23.2", "gguf": "llama.cpp 0.3.36"}
PRECISIONS = {"hf": "fp32", "onnx": "fp32", "onnx-int8": "int8", "gguf-q8_0": "q8_0"}


def export_record(student: dict[str, Any], name: str) -> dict[str, Any]:
    """What is told of an export, the smaller and the further from its student the later its format
    comes."""
    place = FORMATS.index(name)
    bytes_ = int(student["bytes"] / (1 + 0.6 * place))
    keys = ("loss", "kl", "agreement", "accuracy", "acceptance", "ece", "calibration")
    sample = {**{key: student[key] for key in keys}, "positions": 8_192}
    away = 0.002 * place
    return {
        "student": {"fingerprint": student["weights"]},
        "sample": {
            "student": sample,
            "export": {**sample, "loss": sample["loss"] + away, "kl": sample["kl"] + away},
        },
        "check": {"kl": away},
        "costs": {
            "bytes": bytes_,
            "dtype": PRECISIONS.get(name, "fp16"),
            "generation": generation(bytes_ // 4, batches=(1,)),
            "machine": student["machine"],
            "runtime": RUNTIMES.get(name.partition("-")[0], "torch 2.13.0"),
        },
    }


def models_of(printed: str) -> list[str]:
    """Who has a row in the first of the tables that a command printed, in their order."""
    return [line.split()[0] for line in printed.split("\n\n")[0].splitlines()[2:]]


def label_loss_at(student: Made, step: int) -> float:
    """What its metrics say."""
    return student.loss + 3.0 * math.exp(-step / 8)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
