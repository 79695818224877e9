"""Trainings of a benchmark, which are not repeated when it is started again."""

from __future__ import annotations

import shutil
import statistics
from typing import TYPE_CHECKING, Any

import click
from coldstill.data.files import first_difference, json_sha256, read_json, write_json
from coldstill.stages.evaluate import measure_quality
from coldstill.stages.models.isolation import student_isolation
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.train_student import train_student
from pydantic import TypeAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.job import StudentJob

ASKED = ".asked.json"
"""End of the name of a file with the settings of a result, beside it."""


def kept(
    record: Path, asked: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one case and seed: those in `record`, or measured now and written there.

    asked  all settings that the figures depend on; what was begun with others is refused
    """
    asked = TypeAdapter(dict[str, Any]).dump_python(asked, mode="json")
    before = record.with_suffix(ASKED)
    if before.exists():
        if (changed := first_difference(read_json(before), asked)) is not None:
            raise click.ClickException(
                f"{before}: measured with {changed}; delete {record.parent} to measure it again"
            )
    elif record.exists():
        print(f"{record}: of an earlier version, so its settings are unknown", flush=True)
    else:
        write_json(before, asked)
    if not record.exists():
        write_json(record, measure())
    found: dict[str, Any] = read_json(record)
    return found


def settings_of(job: StudentJob, store: StoreReader, heldout: StoreReader) -> dict[str, Any]:
    """What decides the figures of a student."""
    shape = ("architecture", "layers", "prune", "lora", "quantize")
    return {
        **{name: getattr(job, name) for name in (*shape, "model", "objective", "config", "seed")},
        "stores": [json_sha256(one.manifest.to_json()) for one in (store, *job.others, heldout)],
        "shares": job.shares,
    }


def quality_of(model: Any, heldout: StoreReader, where: str) -> dict[str, Any]:
    """Held-out figures of a model."""
    head = connect_head(model, heldout.manifest.tokenizer.size)
    sums, calibration = measure_quality(head, student_isolation(model, heldout, where), heldout)
    return {**sums.means(), "ece": calibration.error()}


def trained(job: StudentJob, store: StoreReader, heldout: StoreReader) -> dict[str, Any]:
    """Held-out figures of a student; it is trained, from its last checkpoint on, unless its folder
    has a result."""

    def measure() -> dict[str, Any]:
        train_student(job, store)
        model = load_model(str(job.model_folder), job.name, precision="fp32")
        return quality_of(model, heldout, job.name)

    record = job.folder / "result.json"
    if not record.exists() and not record.with_suffix(ASKED).exists():
        shutil.rmtree(job.folder, ignore_errors=True)  # checkpoints of unknown settings
    figures = kept(record, settings_of(job, store, heldout), measure)
    for path in job.folder.iterdir():  # models of many trainings would fill the disk
        if path.is_dir():
            shutil.rmtree(path)
    return figures


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
