"""What is known of an export once it was checked: its record, and a sentence."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..models.device import describe_machine, short_dtype
from ..report import Report, Reporter
from .checking import checked
from .measure import resident, writing_speed

if TYPE_CHECKING:
    from pathlib import Path

    from ..evaluation.generation_speed import GenerationSpeed
    from .contract import Format, Runtime
    from .fidelity import Checked
    from .ground import Ground

_VERSION = 2
_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "gguf",
    "llama_cpp_python",
    "torchao",
)


def checked_record(
    stage: str, form: Format, folder: Path, ground: Ground, report: Reporter
) -> tuple[dict[str, Any], str]:
    """What is to be known of an export, and the same in a sentence.

    Raises
        ColdstillError: it is beyond its limits (by what)
    """
    before = resident()
    runtime = form.open(ground.source, folder)
    try:
        found = checked(stage, form, runtime, ground, report)
        speed = None
        if runtime.is_own and ground.read is not None:
            report(Report(stage=stage, doing="measure its speed and memory"))
            speed = writing_speed(runtime, ground.read, before)
    finally:
        runtime.close()
    size = sum(path.stat().st_size for path in folder.glob(form.weights))
    name = stage.split()[-1]
    record = {
        "format": name,
        "version": _VERSION,
        "student": ground.identity,
        "checked_by": runtime.title,
        "checked_by_own_runtime": runtime.is_own,
        "check": found.fidelity.to_json(),
        "limits": asdict(form.limits),
        "packages": _versions(),
        "heldout": ground.heldout,
        "sample": {"student": _plain(found.student), "export": _plain(found.figures)},
        "costs": {
            "bytes": size,
            "dtype": name.partition("-")[2] or short_dtype(str(ground.source.model.dtype)[6:]),
            "generation": [] if speed is None else [asdict(speed)],
            "machine": describe_machine(),
            "runtime": runtime.title,
        },
    }
    return record, _sentence(form, runtime, found, size, speed)


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """As JSON."""
    return {**figures, "calibration": [asdict(one) for one in figures["calibration"]]}


def _sentence(
    form: Format, runtime: Runtime, checked: Checked, size: int, speed: GenerationSpeed | None
) -> str:
    fidelity = checked.fidelity
    said = (
        f"{size / 1e6:.1f} MB, checked by {runtime.title} on {fidelity.positions:,} "
        f"held-out positions: largest difference {fidelity.largest_difference:.2g}, KL "
        f"{fidelity.kl:.2g}, top-1 agreement {fidelity.agreement:.2%}"
    )
    if not runtime.is_own:
        return (
            f"{said}; its own runtime is not installed, so neither it nor its speed was tried: "
            f"pip install 'coldstill[{form.lacking}]', then the same command again"
        )
    if speed is None:
        return said
    return (
        f"{said}; prompts {speed.prefill_tokens_per_second:,.0f} tokens/s, then "
        f"{1e3 * speed.token_seconds:.2f} ms a token"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
