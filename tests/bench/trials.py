"""Trainings of a benchmark, which are not repeated when it is started again."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from coldstill.data.files import write_json
from coldstill.stages.evaluate import measure_quality
from coldstill.stages.models.isolation import student_isolation
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.train_student import train_student

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.job import StudentJob


def trained(job: StudentJob, store: StoreReader, heldout: StoreReader) -> dict[str, Any]:
    """Held-out figures of a student; it is trained unless its folder has a result."""
    record = job.folder / "result.json"
    if not record.exists():
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        train_student(job, store)
        model = load_model(str(job.model_folder), job.name, precision="fp32")
        head = connect_head(model, heldout.manifest.tokenizer.size)
        isolation = student_isolation(model, heldout, job.name)
        sums, calibration = measure_quality(head, isolation, heldout)
        write_json(record, {**sums.means(), "ece": calibration.error()})
        for path in job.folder.iterdir():  # models of many trainings would fill the disk
            if path.is_dir():
                shutil.rmtree(path)
    figures: dict[str, Any] = json.loads(record.read_text())
    return figures
