"""Where a student's first weights come from.

Those that are made of the teacher read it once, before their first step. What they begin with lies
in their folder from then on (`start`) until they are trained, so that a killed training goes on
without the teacher.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json, whole_folder, write_json
from ...data.fingerprint import json_sha256
from ..models.building import build_model, unused_heads
from ..models.generation import repair_generation
from ..models.identity import teacher_identity
from ..models.loading import context_length, load_config, load_model, load_tokenizer
from ..models.vocabulary import expect_rows, expect_same_tokens, vocabulary_rows, without_rowless
from ..ranks import is_one_of_several, rank, wait_for_all, world_size
from ..report import Report, Reporter, silent
from ..training.checkpoints import full_disk_errors
from .pruning.cutting import Cutting, make_cut
from .pruning.layers import TeacherWeights, cut_to_layers, layer_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...data.store.reader import StoreReader
    from ..config import ArchitectureConfig, LayersConfig, LoraConfig, ObjectiveConfig, TrainConfig
    from .pruning.config import PruneConfig

START = "start"
"""What a student made of its teacher was before its first step,"""
PRUNING = "pruning.json"
"""and what pruning made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentJob:
    """One student of one store, or of several with the same sequences."""

    name: str
    architecture: ArchitectureConfig | None
    """A new model, or"""
    model: str | None
    """a folder or hub name to start from, or"""
    layers: LayersConfig | None = None
    """some layers of, or"""
    prune: tuple[PruneConfig, ...] = ()
    """what pruning leaves of, cut after cut,"""
    teacher: TeacherWeights | None = None
    """the store's own teacher; not needed where the student was begun before."""
    lora: LoraConfig | None = None
    """Adapters on frozen weights; all weights are trained without."""
    objective: ObjectiveConfig
    others: tuple[StoreReader, ...] = ()
    """Stores in which further teachers speak of the same sequences."""
    shares: tuple[float, ...] = (1.0,)
    """What part of the objective each store has, the student's own first; their sum is 1."""
    config: TrainConfig
    seed: int
    folder: Path
    begin: Callable[[], None] = lambda: None
    """Called when everything is checked and nothing is written yet."""
    settings: dict[str, Any] | None = None
    """What its checkpoints say of it."""
    own_code: bool = False
    """Whether code that its model brings may run."""
    round: int | None = None
    """Which of several cuts it begins with, from 1 on;"""
    recovered: Path | None = None
    """what was trained after the cut before, and is cut now."""

    @property
    def stage(self) -> str:
        """For reports, behind the command's name."""
        return self.name if self.round is None else f"{self.name} round {self.round}"

    @property
    def start(self) -> Path:
        """Where what it began with lies until it is trained."""
        return self.folder / START

    @property
    def model_folder(self) -> Path:
        """Where it lies when it is trained."""
        return self.folder / "model"

    @property
    def is_of_the_teacher(self) -> bool:
        """Whether its first weights are the teacher's."""
        return self.layers is not None or bool(self.prune)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A student before its first step."""

    model: Any
    pruning: dict[str, Any] | None = None
    """What is to be told of a cut, if one was made just now."""

    def save(self, job: StudentJob, weights: dict[str, Any] | None = None) -> None:
        """Write down what the student begins with. A whole `start` says that it is done."""
        if self.pruning is not None:
            write_json(job.folder / PRUNING, self.pruning)
        with whole_folder(job.start) as scratch, full_disk_errors(job.start):
            self.model.save_pretrained(scratch, state_dict=weights)


def make_student(
    job: StudentJob, store: StoreReader, tokenizer: Any, report: Reporter = silent
) -> Made:
    """A new model, a pretrained one that shares the teacher's tokens, or one made of the teacher.

    Raises
        ColdstillError: as `train_student`, of the model
    """
    where = f"students.{job.name}"
    manifest = store.manifest
    length, vocabulary = manifest.packing.sequence_length, manifest.tokenizer.size
    made = _made(job, store, tokenizer, report, where)
    expect_rows(made.model, vocabulary, where)
    if note := repair_generation(made.model):
        report(Report(stage=f"train-student {job.stage}", note=note, warning=True))
    longest = context_length(made.model.config)
    if longest is not None and longest < length:
        raise ColdstillError(
            f"{where}: its context of {longest} tokens is shorter than the store's sequences of "
            f"{length}"
        )
    return made


def _made(
    job: StudentJob, store: StoreReader, tokenizer: Any, report: Reporter, where: str
) -> Made:
    if job.prune:
        return _pruned(job, store, report, f"{where}.prune")
    if job.architecture is not None:
        length = store.manifest.packing.sequence_length
        place = f"{where}.architecture"
        if note := unused_heads(job.architecture, place):
            report(Report(stage=f"train-student {job.stage}", note=note, warning=True))
        return Made(model=build_model(job.architecture, tokenizer, length, job.seed, place))
    if job.layers is not None:
        return Made(model=_of_layers(job, store, f"{where}.layers"))
    assert job.model is not None  # the recipe has one of them
    return Made(model=_of_model(job.model, job.own_code, tokenizer, where))


def _of_model(name: str, own_code: bool, tokenizer: Any, where: str) -> Any:
    own, rows = (
        f"{where}.model",
        vocabulary_rows(load_config(name, f"{where}.model", own_code=own_code)),
    )
    theirs = without_rowless(load_tokenizer(name, own, own_code=own_code), rows, own)
    expect_same_tokens(tokenizer, theirs, where)
    return load_model(name, own, precision="fp32", own_code=own_code)


def _of_layers(job: StudentJob, store: StoreReader, where: str) -> Any:
    if job.start.is_dir():
        return load_model(str(job.start), where, precision="fp32", own_code=job.own_code)
    assert job.layers is not None
    teacher = _the_stores_own(job.teacher, store, where)
    keep = job.layers.chosen(layer_count(teacher, where), where)
    whole = _whole(teacher, where)
    return cut_to_layers(whole, keep, where).float()


def _pruned(job: StudentJob, store: StoreReader, report: Reporter, where: str) -> Made:
    if not job.start.is_dir() and world_size() > 1:
        if not is_one_of_several():
            raise ColdstillError(
                f"{where}: one process cuts, this is one of {world_size()}; run coldstill "
                f"prune-student --student {job.name} first, then this again"
            )
        if rank() == 0:  # of processes that have trained together, the others wait
            _cut(job, store, report, where).save(job)
        wait_for_all()
    if job.start.is_dir():
        _expect_same_cut(job, store, where)
        start = load_model(str(job.start), where, precision="fp32", own_code=job.own_code)
        return Made(model=start)
    return _cut(job, store, report, where)


def _cut(job: StudentJob, store: StoreReader, report: Reporter, where: str) -> Made:
    if job.recovered is None:
        teacher, whole = _the_stores_own(job.teacher, store, where), None
        model = _whole(teacher, where)
    else:
        model = load_model(str(job.recovered), where, precision="fp32", own_code=job.own_code)
        whole = read_json(job.recovered.parent / PRUNING)["parameters"]["teacher"]
    pruned = make_cut(
        Cutting(
            model=model,
            cuts=job.prune,
            teacher=whole,
            store=store,
            seed=job.seed,
            stage=f"prune-student {job.stage}",
            where=where,
        ),
        report,
    )
    return Made(model=pruned.model, pruning=pruned.record | {"of": _cause(job, store)})


def _whole(teacher: TeacherWeights, where: str) -> Any:
    return load_model(
        teacher.name,
        where,
        precision="auto",
        revision=teacher.revision,
        own_code=teacher.own_code,
    )


def _cause(job: StudentJob, store: StoreReader) -> dict[str, Any]:
    """Everything that decides what a cut leaves."""
    return {
        "prune": asdict(job.prune[0]),
        "cut": job.round or 1,
        "seed": job.seed,
        "store": json_sha256(store.manifest.to_json()),
    }


def _expect_same_cut(job: StudentJob, store: StoreReader, where: str) -> None:
    """Refuse to go on from what was pruned in another way."""
    old, new = read_json(job.folder / PRUNING).get("of", {}), _cause(job, store)
    old, new = ({**cause, **cause.get("prune", {})} for cause in (old, new))
    for key in new:
        if key != "prune" and old.get(key) != new[key]:
            raise ColdstillError(
                f"{job.folder}: {where} was pruned {_with(key, old.get(key))}, now "
                f"{_with(key, new[key])}; "
                "make another under a new name (--student NEW), or delete this folder"
            )


def _with(key: str, value: Any) -> str:
    return f"without {key}" if value is None else f"with {key} = {value}"


def _the_stores_own(
    teacher: TeacherWeights | None, store: StoreReader, where: str
) -> TeacherWeights:
    """Where the store's teacher lies; raises ColdstillError if it is another that lies there."""
    assert teacher is not None  # whoever begins a student has it
    expected = store.manifest.teacher
    found = teacher_identity(
        teacher.name,
        where,
        dtype="auto",
        revision=teacher.revision,
        own_code=teacher.own_code,
    )
    if found.fingerprint != expected.fingerprint:
        raise ColdstillError(
            f"{where}: {teacher.name} is not the teacher of the store ({expected.name}): its "
            f"fingerprint is {found.fingerprint[:12]}, the store's {expected.fingerprint[:12]}; "
            "name that one as teacher.model, or start from 'model'"
        )
    return teacher
