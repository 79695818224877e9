"""A student to be trained, the model that it starts with, and the rounds of iterated pruning.

A student made from the teacher reads the teacher once. Its first weights are kept in `start` until
it is trained, so that an interrupted training continues without the teacher.

Iterated pruning cuts, trains, cuts the trained model again and trains it again. Each round but the
last has a folder inside the student's (`rounds/1`, ...) with the layout of a student's folder; the
last round is the student itself. The models of the rounds are deleted when the student is trained;
their metrics and the records of their cuts stay.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import json_sha256, read_json, whole_folder, write_json
from ..models.building import build_model, unused_heads
from ..models.ends import repair_generation
from ..models.loading import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    teacher_identity,
)
from ..models.vocabulary import expect_rows, expect_same_tokens, vocabulary_rows, without_rowless
from ..ranks import is_one_of_several, rank, wait_for_all, world_size
from ..report import Report, Reporter, silent
from ..training.checkpoints import full_disk_errors
from .pruning.cutting import make_cut
from .pruning.layers import cut_to_layers, layer_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...data.store.reader import StoreReader
    from ..config import (
        ArchitectureConfig,
        LayersConfig,
        LoraConfig,
        QuantizeConfig,
        TrainConfig,
    )
    from ..objective_config import ObjectiveConfig
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
    importance: Path | None = None
    """Folder of the importance of the teacher's parts, which all students of a run share."""
    teacher: TeacherWeights | None = None
    """Weights of the store's teacher for `layers` and `prune`; not needed once `start` exists."""
    lora: LoraConfig | None = None
    """Adapters on frozen weights; None trains all weights."""
    quantize: QuantizeConfig | None = None
    """Train with rounded weights; None trains exact ones."""
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
    training: int | None = None
    """Number of this training of a student with `rounds`, from 1; None without them."""
    own: tuple[StoreReader, ...] = ()
    """Stores of the text that this student wrote after earlier trainings."""
    own_share: float = 0.0
    """Share of the sequences that are read from `own`."""

    @property
    def stage(self) -> str:
        """Name of the student and round in reports."""
        own = "" if self.training is None else f" round {self.training}"
        cut = "" if self.round is None else f" {'cut' if own else 'round'} {self.round}"
        return f"{self.name}{own}{cut}"

    @property
    def start(self) -> Path:
        """Folder of the model before its first step; deleted when the student is trained."""
        return self.folder / START

    @property
    def model_folder(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "model"

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the first weights are the teacher's."""
        return self.layers is not None or bool(self.prune)

    def rounds(self) -> list[StudentJob]:
        """The trainings of this student, in order: one, or one for each cut."""
        count = len(self.prune)
        if count < 2:
            return [self]
        found: list[StudentJob] = []
        for number in range(1, count + 1):
            found.append(
                replace(
                    self,
                    round=number,
                    folder=self.folder if number == count else self.folder / _ROUNDS / str(number),
                    prune=self.prune[number - 1 :],  # later cuts must be possible too
                    recovered=found[-1].model_folder if found else None,
                    # a model is cut between its rounds, which takes it off the grid
                    quantize=self.quantize if number == count else None,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NewStudent:
    """A student before its first step."""

    model: Any
    pruning: dict[str, Any] | None = None
    """Record of the cut, if one was made now."""

    def save(self, job: StudentJob, weights: dict[str, Any] | None = None) -> None:
        """Write the record and the model; a complete `start` means that both are written."""
        if self.pruning is not None:
            write_json(job.folder / PRUNING, self.pruning)
        with whole_folder(job.start) as scratch, full_disk_errors(job.start):
            self.model.save_pretrained(scratch, state_dict=weights)


def make_student(
    job: StudentJob, store: StoreReader, tokenizer: Any, report: Reporter = silent
) -> NewStudent:
    """Make or load the model of a student.

    Raises
        ColdstillError: the model has other tokens or a shorter context than the store, belongs to
            another teacher, or cannot be built, loaded or cut
    """
    where = f"students.{job.name}"
    length = store.manifest.packing.sequence_length
    if job.prune:
        made = _pruned(job, store, report, f"{where}.prune")
    elif job.architecture is not None:
        table = f"{where}.architecture"
        if note := unused_heads(job.architecture, table):
            report(Report(stage=f"train-student {job.stage}", note=note, warning=True))
        made = NewStudent(model=build_model(job.architecture, tokenizer, length, job.seed, table))
    elif job.layers is not None:
        made = NewStudent(model=_of_layers(job, store, f"{where}.layers"))
    else:
        made = NewStudent(model=_of_model(job, tokenizer, where))
    expect_rows(made.model, store.manifest.tokenizer.size, where)
    if note := repair_generation(made.model):
        report(Report(stage=f"train-student {job.stage}", note=note, warning=True))
    longest = context_length(made.model.config)
    if longest is not None and longest < length:
        raise ColdstillError(
            f"{where}: its context of {longest} tokens is shorter than the store's sequences of "
            f"{length}"
        )
    return made


def _of_model(job: StudentJob, tokenizer: Any, where: str) -> Any:
    assert job.model is not None  # the recipe has exactly one origin
    name, key, own_code = job.model, f"{where}.model", job.own_code
    rows = vocabulary_rows(load_config(name, key, own_code=own_code))
    theirs = without_rowless(load_tokenizer(name, key, own_code=own_code), rows, key)
    expect_same_tokens(tokenizer, theirs, where)
    return load_model(name, key, precision="fp32", own_code=own_code)


def _of_layers(job: StudentJob, store: StoreReader, where: str) -> Any:
    if job.start.is_dir():
        return load_model(str(job.start), where, precision="fp32", own_code=job.own_code)
    assert job.layers is not None
    assert job.teacher is not None
    keep = job.layers.chosen(layer_count(job.teacher, where), where)
    return cut_to_layers(_load_teacher(job, store, where), keep, where).float()


def _pruned(job: StudentJob, store: StoreReader, report: Reporter, where: str) -> NewStudent:
    if not job.start.is_dir() and world_size() > 1:
        if not is_one_of_several():
            raise ColdstillError(
                f"{where}: cutting takes one process, this is one of {world_size()}; run coldstill "
                f"prune-student --student {job.name} first, then this again"
            )
        if rank() == 0:  # several processes get here in later rounds only
            _cut(job, store, report, where).save(job)
        wait_for_all()
    if job.start.is_dir():
        _expect_same_cut(job, store, where)
        start = load_model(str(job.start), where, precision="fp32", own_code=job.own_code)
        return NewStudent(model=start)
    return _cut(job, store, report, where)


def _cut(job: StudentJob, store: StoreReader, report: Reporter, where: str) -> NewStudent:
    if job.recovered is None:
        model, parameters = _load_teacher(job, store, where), None
    else:
        model = load_model(str(job.recovered), where, precision="fp32", own_code=job.own_code)
        parameters = read_json(job.recovered.parent / PRUNING)["parameters"]["teacher"]
    pruned, record = make_cut(
        model,
        job.prune,
        store,
        teacher=parameters,
        seed=job.seed,
        stage=f"prune-student {job.stage}",
        where=where,
        scores=_scores(job, store),
        report=report,
    )
    return NewStudent(model=pruned, pruning=record | {"of": _cause(job, store)})


def _scores(job: StudentJob, store: StoreReader) -> Path | None:
    """File of the importance of the teacher's parts. The sizes of a cut do not change it."""
    if job.importance is None or job.recovered is not None:
        return None
    cause = _cause(job, store)
    sample = {"sequences": job.prune[0].sequences, "seed": cause["seed"], "store": cause["store"]}
    return job.importance / f"{json_sha256(sample)[:16]}.safetensors"


def _cause(job: StudentJob, store: StoreReader) -> dict[str, Any]:
    """Everything that decides the result of a cut."""
    return {
        "prune": asdict(job.prune[0]),
        "cut": job.round or 1,
        "seed": job.seed,
        "store": json_sha256(store.manifest.to_json()),
    }


def _expect_same_cut(job: StudentJob, store: StoreReader, where: str) -> None:
    """Refuse to continue from a model that was cut with other settings."""
    old, new = read_json(job.folder / PRUNING).get("of", {}), _cause(job, store)
    old, new = ({**cause, **cause.get("prune", {})} for cause in (old, new))
    for key in new:
        if key != "prune" and old.get(key) != new[key]:
            before, now = (
                f"without {key}" if value is None else f"with {key} = {value}"
                for value in (old.get(key), new[key])
            )
            raise ColdstillError(
                f"{job.folder}: {where} was pruned {before}, now {now}; make another under a new "
                "name (--student NEW), or delete this folder"
            )


def _load_teacher(job: StudentJob, store: StoreReader, where: str) -> Any:
    """The store's teacher. Refuses weights of another one before they are loaded."""
    teacher, expected = job.teacher, store.manifest.teacher
    assert teacher is not None  # the pipeline sets it for every student without `start`
    name, revision, own_code = teacher.name, teacher.revision, teacher.own_code
    found = teacher_identity(name, where, dtype="auto", revision=revision, own_code=own_code)
    if found.fingerprint != expected.fingerprint:
        raise ColdstillError(
            f"{where}: {name} is not the teacher of the store ({expected.name}): its "
            f"fingerprint is {found.fingerprint[:12]}, the store's {expected.fingerprint[:12]}; "
            "set teacher.model to the store's teacher, or start from 'model'"
        )
    return load_model(name, where, precision="auto", revision=revision, own_code=own_code)
