"""Where a student's first weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from .layers import TeacherWeights, cut_to_layers, layer_count
from .models import (
    build_model,
    context_length,
    expect_same_tokens,
    load_model,
    load_tokenizer,
    teacher_identity,
)

if TYPE_CHECKING:
    from collections.abc import Callable
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

START = "start"
"""What a student made of its teacher was before its first step."""


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
