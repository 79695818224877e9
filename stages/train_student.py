"""Stage two: train a student from the store. Never imports, loads or needs the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import whole_folder
from .device import best_device
from .feed import StoreDataset
from .isolation import choose_isolation
from .mixture import MixedDataset, mixed_stores
from .models import (
    build_model,
    context_length,
    expect_same_tokens,
    load_model,
    load_tokenizer,
)
from .objective import mixed_terms
from .output_head import connect_head
from .report import Report, Reporter, silent
from .training import TrainingJob, full_disk_told, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..data.reader import StoreReader
    from .config import ArchitectureConfig, ObjectiveConfig, TrainConfig
    from .isolation import Isolation

STAGE = "train-student"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentJob:
    """One student of one store, or of several with the same sequences."""

    name: str
    architecture: ArchitectureConfig | None
    """A new model, or"""
    model: str | None
    """a folder or hub name to start from."""
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


def train_student(job: StudentJob, store: StoreReader, report: Reporter = silent) -> None:
    """Train one student; write it to `folder/model`, which then is whole.

    Raises
        ColdstillError: a student with other tokens or too short a context, an objective that the
            store cannot support, a store with nothing to learn, stores of different sequences
    """
    where = f"students.{job.name}"
    manifest = store.manifest
    stores, shares = mixed_stores((store, *job.others), job.shares, f"{where}.teachers")
    captures = [(each.manifest.capture, str(each.place)) for each in stores]
    terms = mixed_terms(job.objective, captures, shares, f"{where}.objective")
    if store.positions == 0:
        raise ColdstillError(f"{store.place}: no supervised position, nothing to learn")
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    length = manifest.packing.sequence_length
    model = make_student(job, tokenizer, length, manifest.tokenizer.size)
    model.to(best_device())
    isolation = student_isolation(model, store, where)
    train(
        TrainingJob(
            stage=f"{STAGE} {job.name}",
            head=connect_head(model, manifest.tokenizer.size, report),
            dataset=StoreDataset(store) if len(stores) == 1 else MixedDataset(stores),
            isolation=isolation,
            capture=manifest.capture,
            others=[capture for capture, _ in captures[1:]],
            terms=terms,
            config=job.config,
            sequence_length=length,
            seed=job.seed,
            folder=job.folder,
            begin=job.begin,
        ),
        report,
    )
    with whole_folder(job.folder / "model") as scratch, full_disk_told(job.folder / "model"):
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    report(
        Report(stage=f"{STAGE} {job.name}", note=f"{model.num_parameters():,} parameters trained")
    )


def make_student(job: StudentJob, tokenizer: Any, length: int, vocabulary: int) -> Any:
    """A new model, or a pretrained one that shares the teacher's tokens."""
    where = f"students.{job.name}"
    if job.architecture is not None:
        model = build_model(job.architecture, tokenizer, length, job.seed, f"{where}.architecture")
    else:
        assert job.model is not None  # the recipe has one or the other
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
