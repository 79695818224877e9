"""A student to be trained, and the rounds of iterated pruning.

Iterated pruning cuts, trains, cuts the trained model again and trains it again. Each round but the
last has a folder inside the student's (`rounds/1`, ...) with the layout of a student's folder; the
last round is the student itself. The models of the rounds are deleted when the student is trained;
their metrics and the records of their cuts stay.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...data.store.reader import StoreReader
    from ..config import ArchitectureConfig, LayersConfig, LoraConfig, ObjectiveConfig, TrainConfig
    from .pruning.config import PruneConfig
    from .pruning.layers import TeacherWeights

START = "start"
"""Folder with the model of a student before its first step, if it was made from the teacher."""
PRUNING = "pruning.json"
"""Record of a cut."""
_ROUNDS = "rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentJob:
    """One student of a store, or of several stores with the same sequences.

    Exactly one of `architecture`, `model`, `layers` and `prune` is given.
    """

    name: str
    architecture: ArchitectureConfig | None
    """Sizes of a new model."""
    model: str | None
    """Folder or hub name of a model to start from."""
    layers: LayersConfig | None = None
    """Layers of the teacher to start from."""
    prune: tuple[PruneConfig, ...] = ()
    """Cuts of the teacher, one after another."""
    teacher: TeacherWeights | None = None
    """Weights of the store's teacher for `layers` and `prune`; not needed once `start` exists."""
    lora: LoraConfig | None = None
    """Adapters on frozen weights; None trains all weights."""
    objective: ObjectiveConfig
    others: tuple[StoreReader, ...] = ()
    """Stores of further teachers with the same sequences."""
    shares: tuple[float, ...] = (1.0,)
    """Share of the objective of each store, the student's own first; their sum is 1."""
    config: TrainConfig
    seed: int
    folder: Path
    begin: Callable[[], None] = lambda: None
    """Called after all checks, before the first file is written."""
    settings: dict[str, Any] | None = None
    """Settings that are recorded in checkpoints."""
    own_code: bool = False
    """Whether code that comes with the model may run."""
    round: int | None = None
    """Number of this round of iterated pruning, from 1; None if there is only one."""
    recovered: Path | None = None
    """Model folder of the previous round, which this round cuts."""

    @property
    def stage(self) -> str:
        """Name of the student and round in reports."""
        return self.name if self.round is None else f"{self.name} round {self.round}"

    @property
    def start(self) -> Path:
        """Folder of the model before its first step; deleted when the student is trained."""
        return self.folder / START

    @property
    def model_folder(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "model"

    @property
    def is_of_the_teacher(self) -> bool:
        """Whether the first weights are the teacher's."""
        return self.layers is not None or bool(self.prune)

    def rounds(self) -> list[StudentJob]:
        """The trainings of this student, in order: one, or one for each cut."""
        count = len(self.prune)
        if count < 2:
            return [self]
        folders = [self.folder / _ROUNDS / str(number) for number in range(1, count)]
        found: list[StudentJob] = []
        for number, folder in enumerate([*folders, self.folder], 1):
            found.append(
                replace(
                    self,
                    round=number,
                    folder=folder,
                    prune=self.prune[number - 1 :],  # later cuts must be possible too
                    recovered=found[-1].model_folder if found else None,
                )
            )
        return found

    def remaining_rounds(self) -> list[StudentJob]:
        """The last round that was started and those after it. Earlier rounds are done, and their
        models may be deleted."""
        rounds = self.rounds()
        started = [
            number
            for number, each in enumerate(rounds)
            if each.start.is_dir() or each.model_folder.is_dir()
        ]
        return rounds[max(started, default=0) :]

    def delete_rounds(self) -> None:
        """Delete the models of the rounds; keep their metrics and records."""
        for folder in (self.folder / _ROUNDS).glob("*/*/"):
            shutil.rmtree(folder, ignore_errors=True)
