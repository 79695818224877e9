"""What is known of an export once it was checked: its record, a row of figures, and a sentence."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ..device import describe_machine
from ..evaluate import Evaluation
from ..evaluation.flops import flops_per_token
from ..report import Report, Reporter
from .fidelity import check
from .measure import memory, reading_speed, resident, writing_speed

if TYPE_CHECKING:
    from pathlib import Path

    from ..evaluation.generation_speed import GenerationSpeed
    from .contract import Format, Runtime
    from .fidelity import Checked
    from .ground import Ground
    from .measure import Memory

_VERSION = 1
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
        cost = memory(runtime, before, ground.text_T)
        checked = _checked(stage, form, runtime, ground, report)
        reading, generation = 0.0, None
        if runtime.is_own:
            reading = reading_speed(runtime, ground.text_T)
            generation = writing_speed(runtime, ground.text_T)
    finally:
        runtime.close()
    size = sum(path.stat().st_size for path in folder.glob(form.weights))
    costs = _Costs(bytes=size, memory=cost, reading=reading, generation=generation)
    record = {
        "format": stage.split()[-1],
        "version": _VERSION,
        "student": ground.identity,
        "checked_by": runtime.title,
        "checked_by_own_runtime": runtime.is_own,
        "check": checked.fidelity.to_json(),
        "limits": asdict(form.limits),
        "memory": asdict(cost) if runtime.is_own else None,
        "student_generation": asdict(ground.generation),
        "packages": _versions(),
        "row": {
            **_row(stage.split()[-1], runtime, checked, ground, costs),
            "heldout": ground.heldout,
        },
    }
    return record, _sentence(runtime, checked, costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """What an export takes where it runs."""

    bytes: int
    memory: Memory
    reading: float
    """Tokens/s; 0 if its own runtime is not here,"""
    generation: GenerationSpeed | None
    """and then there is nothing to tell of this either."""


def _checked(
    stage: str, form: Format, runtime: Runtime, ground: Ground, report: Reporter
) -> Checked:
    source, total = ground.source, len(ground.documents)

    def tell(done: int) -> None:
        report(Report(stage=stage, done=done, total=total, step=1, unit="documents"))

    checked = check(ground.student, runtime, ground.documents, source.vocabulary, tell)
    excess = checked.fidelity.excess(form.limits)
    if excess is not None:
        raise ColdstillError(
            f"{stage}: {runtime.title} does not say what the student says, over "
            f"{checked.fidelity.positions:,} held-out positions: {excess}; nothing was kept"
        )
    return checked


def _row(
    name: str, runtime: Runtime, checked: Checked, ground: Ground, costs: _Costs
) -> dict[str, Any]:
    """Like a student's own row in the comparison, on the sampled documents, one at a time."""
    loss, positions = checked.figures["loss"], checked.figures["positions"]
    bits = loss * positions / math.log(2)
    return asdict(
        Evaluation(
            name=f"{ground.source.name} ({name})",
            role="export",
            parameters=ground.identity["parameters"],
            bytes=costs.bytes,
            **checked.figures,
            bits_per_byte=bits / ground.label_bytes if ground.label_bytes else None,
            tokens_per_second=costs.reading,
            peak_memory_bytes=costs.memory.peak if runtime.is_own else 0,
            flops_per_token=flops_per_token(ground.source.model, len(ground.text_T)),
            generation=() if costs.generation is None else (costs.generation,),
            machine=f"{runtime.title}, {describe_machine()}",
        )
    )


def _sentence(runtime: Runtime, checked: Checked, costs: _Costs) -> str:
    fidelity, speed = checked.fidelity, costs.generation
    said = (
        f"{costs.bytes / 1e6:.1f} MB, checked by {runtime.title} on {fidelity.positions:,} "
        f"held-out positions: largest difference {fidelity.largest_difference:.2g}, KL "
        f"{fidelity.kl:.2g}, top-1 agreement {fidelity.agreement:.2%}"
    )
    if speed is None:
        return f"{said}; its own runtime is not installed, so neither it nor its speed was tried"
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
