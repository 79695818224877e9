"""Stage two: train a student from the store. Never runs the teacher.

A student made of the teacher's layers reads them once, before its first step. What it begins with
lies in its folder from then on (`start`) until it is trained, so that a killed training goes on
without the teacher.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import whole_folder
from .device import best_device
from .feed import StoreDataset
from .isolation import choose_isolation
from .layers import TeacherWeights, cut_to_layers, layer_count
from .lesson import lesson
from .lora import adapt, expect_peft, merge
from .mixture import MixedDataset
from .models import (
    build_model,
    context_length,
    expect_same_tokens,
    load_model,
    load_tokenizer,
    teacher_identity,
)
from .objective import supports
from .output_head import connect_head
from .ranks import rank, wait_for_all
from .report import Report, Reporter, silent
from .training import TrainingJob, full_disk_told, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..data.manifest import TeacherIdentity
    from ..data.reader import StoreReader
    from .config import (
        ArchitectureConfig,
        LayersConfig,
        LoraConfig,
        ObjectiveConfig,
        TrainConfig,
    )
    from .isolation import Isolation

STAGE = "train-student"
START = "start"
"""What a student of the teacher's layers was before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentJob:
    """One student of one store, or of several with the same sequences."""

    name: str
    architecture: ArchitectureConfig | None
    """A new model, or"""
    model: str | None
    """a folder or hub name to start from, or"""
    layers: LayersConfig | None = None
    """some layers of"""
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
    """Called once, when everything is checked and nothing is written yet."""
    settings: dict[str, Any] | None = None
    """What its checkpoints say of it."""


def train_student(job: StudentJob, store: StoreReader, report: Reporter = silent) -> None:
    """Train one student; write it to `folder/model`, which then is whole.

    Raises
        ColdstillError: a student with other tokens or too short a context, another teacher's
            layers, an objective that the store cannot support, a store with nothing to learn,
            stores of different sequences, adapters that cannot be
    """
    where = f"students.{job.name}"
    manifest = store.manifest
    taught = lesson(job, store)
    if job.lora is not None:
        expect_peft(f"{where}.lora")
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    length = manifest.packing.sequence_length
    model = make_student(job, tokenizer, length, manifest.tokenizer.size, manifest.teacher)
    model.to(best_device())
    isolation = student_isolation(model, store, where)
    head = connect_head(model, manifest.tokenizer.size, report)
    config = copy.deepcopy(model.config)  # the trainer leaves settings of its own in it
    begin = _beginning(job, model)
    judged = supports(taught.terms, taught.captures, manifest.tokenizer.size)
    adapters = None if job.lora is None else adapt(model, job.lora, job.seed, f"{where}.lora")
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    train(
        TrainingJob(
            stage=f"{STAGE} {job.name}",
            head=head,
            dataset=_dataset(taught.stores),
            isolation=isolation,
            capture=manifest.capture,
            others=taught.captures[1:],
            terms=taught.terms,
            config=job.config,
            sequence_length=length,
            seed=job.seed,
            folder=job.folder,
            begin=_telling(begin, f"{STAGE} {job.name}", judged, report),
            settings=job.settings,
        ),
        report,
    )
    if adapters is not None:
        merge(adapters)
    model.config = config
    _save(job, model, tokenizer)
    size = f"{model.num_parameters():,} parameters"
    merged = f"{learned:,} adapter weights trained and merged into {size}"
    note = f"{size} trained" if job.lora is None else merged
    report(Report(stage=f"{STAGE} {job.name}", note=note))


def _dataset(stores: Sequence[StoreReader]) -> StoreDataset | MixedDataset:
    return StoreDataset(stores[0]) if len(stores) == 1 else MixedDataset(stores)


def _telling(
    begin: Callable[[], None], stage: str, judged: str, report: Reporter
) -> Callable[[], None]:
    """Say what the record makes of the objective, where it is read at all."""

    def tell() -> None:
        begin()
        if judged:
            report(Report(stage=stage, note=f"{judged} with this record"))

    return tell


def _save(job: StudentJob, model: Any, tokenizer: Any) -> None:
    folder = job.folder / "model"
    if rank() == 0:
        with whole_folder(folder) as scratch, full_disk_told(folder):
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        shutil.rmtree(job.folder / START, ignore_errors=True)
    wait_for_all()  # nobody goes on to what rests on it


def make_student(
    job: StudentJob, tokenizer: Any, length: int, vocabulary: int, teacher: TeacherIdentity
) -> Any:
    """A new model, a pretrained one that shares the teacher's tokens, or layers of the teacher.

    vocabulary  V of the store
    teacher     whom the store is of

    Raises
        ColdstillError: as `train_student`, of the model
    """
    where = f"students.{job.name}"
    if job.architecture is not None:
        model = build_model(job.architecture, tokenizer, length, job.seed, f"{where}.architecture")
    elif job.layers is not None:
        model = _of_layers(job, teacher, f"{where}.layers")
    else:
        assert job.model is not None  # the recipe has one of them
        expect_same_tokens(tokenizer, load_tokenizer(job.model, f"{where}.model"), where)
        model = load_model(job.model, f"{where}.model", precision="fp32")
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocabulary:
        raise ColdstillError(
            f"{where}: its head has {rows} rows, the tokenizer has {vocabulary} tokens"
        )
    longest = context_length(model.config)
    if longest is not None and longest < length:
        raise ColdstillError(
            f"{where}: its context of {longest} tokens is shorter than the store's sequences of "
            f"{length}"
        )
    return model


def _of_layers(job: StudentJob, expected: TeacherIdentity, where: str) -> Any:
    start = job.folder / START
    if start.is_dir():
        return load_model(str(start), where, precision="fp32")
    assert job.layers is not None
    assert job.teacher is not None
    name, revision = job.teacher.name, job.teacher.revision
    found = teacher_identity(name, where, dtype="auto", revision=revision)
    if found.fingerprint != expected.fingerprint:
        raise ColdstillError(
            f"{where}: {name} is not the teacher of the store ({expected.name}): its fingerprint "
            f"is {found.fingerprint[:12]}, the store's {expected.fingerprint[:12]}; name that one "
            "as teacher.model, or start from 'model'"
        )
    keep = job.layers.chosen(layer_count(job.teacher, where), where)
    whole = load_model(name, where, precision="auto", revision=revision)
    return cut_to_layers(whole, keep, where).float()


def _beginning(job: StudentJob, model: Any) -> Callable[[], None]:
    """What training does first. Asked for before the trainer and adapters change the model."""
    config = copy.deepcopy(model.config)
    weights = model.state_dict() if job.layers is not None else None
    start = job.folder / START

    def begin() -> None:
        job.begin()
        if weights is None or start.is_dir() or rank() != 0:
            return
        with _as_it_was(model, config), whole_folder(start) as scratch, full_disk_told(start):
            model.save_pretrained(scratch, state_dict=weights)

    return begin


@contextlib.contextmanager
def _as_it_was(model: Any, config: Any) -> Iterator[None]:
    """For saving: with frozen weights, which adapters keep out of checkpoints, and the config."""
    now = model.config, model._keys_to_ignore_on_save
    model.config, model._keys_to_ignore_on_save = config, type(model)._keys_to_ignore_on_save
    try:
        yield
    finally:
        model.config, model._keys_to_ignore_on_save = now


def student_isolation(model: Any, store: StoreReader, where: str) -> Isolation:
    """How this student keeps the store's documents apart, as the teacher did.

    Raises
        ColdstillError: it cannot, and the store holds packed documents
    """
    packing = store.manifest.packing
    if not packing.together:
        return "single"
    isolation = choose_isolation(model, store.manifest.tokenizer.size, packing.sequence_length)
    if isolation == "single":
        raise ColdstillError(
            f"{where}: a {model.config.model_type!r} model cannot keep packed documents apart, as "
            "the teacher did; capture again with corpus.pack = false"
        )
    return isolation
