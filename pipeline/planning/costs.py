"""Estimated memory of each stage, and the time that is left of it at measured speeds."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from ...data.places.place import place_at
from ...data.store.manifest import read_measurements
from ...stages.config import RetokenizeConfig, sequences_in
from ...stages.planning.memory import capture_memory, training_memory
from ...stages.planning.model_sizes import adapter_parameters
from ...stages.planning.rounding import RoundedSteps
from ...stages.students.rounds.config import BATCH_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...data.prepared import Split
    from ...stages.config import LoraConfig, QuantizeConfig, TrainConfig
    from ...stages.planning.model_sizes import ModelSizes
    from ...stages.students.pruning.config import PruneConfig
    from ..recipe.run_folder import Run, StudentFolder
    from ..recipe.tables import Recipe, StudentTable
    from .pilot_record import PilotRecord
    from .sizes import StoreSize


_PRUNING_TOKENS = 8192
"""Tokens of a forward pass when pruning measures importance."""


def stage_memory(
    recipe: Recipe, teacher: ModelSizes | None, students: Mapping[str, Sequence[ModelSizes]]
) -> dict[str, int | None]:
    """Bytes of each stage, by command and student; None if a model is not on this machine.

    students  sizes in each training, as `models.student_sizes` returns them; the first training
              needs the most memory
    """
    length = recipe.corpus.sequence_length
    table, batch_tokens = recipe.teacher, recipe.logits.batch_tokens
    found: dict[str, int | None] = {}
    if table.train is not None:
        found["train-teacher"] = _training(teacher, table.train, length, table.lora)
    if table.url is None:  # a server's memory is not this machine's
        found["teacher-logits"] = (
            None if teacher is None else capture_memory(teacher, table.dtype, batch_tokens, length)
        )
    for name, sizes in students.items():
        student = recipe.students[name]
        if student.prune:
            found[f"prune-student {name}"] = (
                None
                if teacher is None
                else capture_memory(teacher, "auto", _PRUNING_TOKENS, length)
            )
        # only the last of several trainings rounds
        rounded = student.quantize is not None and len(student.prune or ()) < 2
        first = sizes[0] if sizes else None
        decided = student.retokenize or RetokenizeConfig()
        beside = decided.branches if "branches" in student.objective.weights else 0.0
        found[f"train-student {name}"] = _training(
            first, student.train, length, student.lora, rounded=rounded, branches=beside
        )
        if student.rounds is not None:
            found[f"rounds write {name}"] = (
                capture_memory(sizes[-1], "float32", BATCH_TOKENS, length) if sizes else None
            )
            found[f"rounds capture {name}"] = found.get("teacher-logits")
    return found


def _training(
    sizes: ModelSizes | None,
    config: TrainConfig,
    length: int,
    lora: LoraConfig | None,
    *,
    rounded: bool = False,
    branches: float = 0.0,
) -> int | None:
    if sizes is None:
        return None
    tokens = min(config.batch_tokens, config.micro_batch_tokens or config.batch_tokens)
    columns = round(length * (1.0 + _READ * branches))  # branches are read behind the text
    return training_memory(
        sizes,
        config.precision,
        sequences_in(tokens, length) * columns,
        columns,
        frozen=lora is not None,
        adapters=0 if lora is None else adapter_parameters(sizes, lora.rank),
        checkpointing=config.gradient_checkpointing,
        rounded=rounded,
    )


_READ = 2.0
"""Tokens that are read of a branch, about."""
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


def pruning_hours(
    cut: PruneConfig,
    before: ModelSizes,
    after: ModelSizes,
    tokens: int,
    speed: float | None,
    *,
    known: bool = False,
) -> float | None:
    """Hours to make one cut; None without a measured speed.

    before, after  sizes of the model that is cut, and of the smaller one
    tokens         tokens of the store's sequences on which importance is measured
    speed          tokens per second of a forward pass of the model that is cut
    known          whether another cut on the same sequences has measured importance
    """
    if speed is None:
        return None
    # importance, and the loss after the cut
    passes = (0 if known else 1) + after.parameters / before.parameters
    if cut.layers_by == "loss":
        # one layer after another is removed, each time after a pass without each layer that is left
        left = range(after.layers + 1, before.layers + 1)
        passes += sum(count * (count - 1) for count in left) / before.layers
    return passes * tokens / speed / 3600


def forward_speed(run: Run, pilot: PilotRecord | None) -> float | None:
    """Tokens per second of the teacher's forward pass, as measured after a capture or by the pilot.

    pilot  None if the teacher writes answers: their time is not that of a forward pass
    """
    for address in (run.logits, run.heldout):
        forward = read_measurements(place_at(address)).get("forward")
        if isinstance(forward, dict) and (speed := _speed(forward.get("tokens_per_second"))):
            return speed
    return None if pilot is None else pilot.tokens_per_second


def training_hours(
    config: TrainConfig,
    folder: Path,
    sequence_length: int,
    quantize: QuantizeConfig | None = None,
    measured: Path | None = None,
) -> float | None:
    """Hours for the remaining steps at the speed of the last ones; None without metrics.

    quantize  how the last steps round; those before, whose speed may be all that is known, do not
    measured  the folder whose metrics tell the speed, if not `folder`
    """
    own = metrics_lines(folder / "metrics.jsonl")
    lines = own if measured is None else metrics_lines(measured / "metrics.jsonl")
    steps = rounded_steps(config, sequence_length, quantize)
    speeds = [
        speed * steps.plain(int(line["step"]) - 1, int(line["step"]))
        for line in lines[-_LINES:]
        if (speed := _speed(line.get("tokens_per_second")))
    ]
    if not speeds:
        return None
    left = steps.plain(int(own[-1]["step"]) if own else 0, config.steps)
    tokens = left * sequences_in(config.batch_tokens, sequence_length) * sequence_length
    return tokens / statistics.median(speeds) / 3600


def rounded_steps(
    config: TrainConfig, sequence_length: int, quantize: QuantizeConfig | None
) -> RoundedSteps:
    """The steps of a training on one process that round."""
    most = min(config.batch_tokens, config.micro_batch_tokens or config.batch_tokens)
    tokens = sequences_in(most, sequence_length) * sequence_length
    return RoundedSteps.of(quantize, config.steps, tokens)


def round_hours(student: StudentTable, folder: StudentFolder, sequence_length: int) -> float | None:
    """Hours for the trainings of a student with rounds that are left; None without a speed, or with
    several cuts, whose models have speeds of their own."""
    rounds = student.rounds
    assert rounds is not None
    if len(student.prune or ()) > 1:
        return None
    trainings = [folder.training(number + 1, rounds.count) for number in range(rounds.count)]
    begun = [each.root for each in trainings if metrics_lines(each.metrics)]
    total = 0.0
    for number, each in enumerate(trainings):
        if each.model.exists():
            continue
        config = rounds.training(student.train) if number else student.train
        own = each.root if each.root in begun else begun[-1] if begun else None
        hours = training_hours(config, each.root, sequence_length, student.quantize, own)
        if hours is None:
            return None
        total += hours
    return total


def writing_speed(folder: StudentFolder, count: int) -> float | None:
    """Tokens per second at which a student with rounds wrote last; None if it never did."""
    for number in range(count, 0, -1):
        path = folder.text(number).speed
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and (speed := _speed(found.get("tokens_per_second"))):
            return speed
    return None


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
    return _speed(read_measurements(place_at(address)).get("capture_tokens_per_second"))


def _speed(value: Any) -> float | None:
    """A positive number as a speed, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value > 0 else None
