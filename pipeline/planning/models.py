"""The models that a recipe names: their folders, families and sizes. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.places.place import place_at
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...stages.planning.model_sizes import (
    anatomy_of_model,
    anatomy_of_table,
    family_of_model,
    model_folder,
    sizes_of_cuts,
    sizes_of_layers,
    sizes_of_model,
    sizes_of_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ...stages.config import ArchitectureConfig
    from ...stages.planning.model_sizes import ModelSizes
    from ...stages.students.pruning.config import PruneConfig
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work

_ANY_VOCABULARY = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    key: str
    """The recipe's key, for messages."""
    model: str
    revision: str = "main"
    own_code: bool = False
    """Whether code that comes with the model may run."""


def named_teacher(work: Work) -> NamedModel | None:
    """The existing model that the recipe names as its teacher; None for a new teacher."""
    table = work.recipe.teacher
    if table.model is None:
        return None
    return NamedModel(
        key="teacher.model",
        model=table.model,
        revision=table.revision,
        own_code=table.trust_remote_code,
    )


def tokenizer_of_model(work: Work, named: NamedModel) -> Any:
    """Load a model's tokenizer, without the tokens that its model has no row for."""
    from ...stages.models.loading import load_config, load_tokenizer
    from ...stages.models.vocabulary import vocabulary_rows, without_rowless

    where = (work.local(named.model), named.key, named.revision)
    tokenizer = load_tokenizer(*where, own_code=named.own_code)
    rows = vocabulary_rows(load_config(*where, own_code=named.own_code))
    return without_rowless(tokenizer, rows, named.key)


def folder_of(work: Work, model: str, revision: str = "main") -> Path | None:
    """Folder of a model on this machine; None if it is not here, which the step that needs the
    model reports. Raises ColdstillError if its file is here and cannot be read."""
    try:
        return model_folder(work.local(model), revision)
    except ColdstillError:
        if work.has_file(model):  # it is here, and cannot be read
            raise
        return None


def student_models(work: Work) -> Iterator[NamedModel]:
    """The models from which students that are not trained yet start."""
    for name, student in work.recipe.students.items():
        if student.model is not None and not work.run.student(name).model.exists():
            yield NamedModel(
                key=f"students.{name}.model",
                model=student.model,
                own_code=student.trust_remote_code,
            )


def teacher_family(work: Work) -> str | None:
    """The teacher's `model_type`; None if its model is not on this machine."""
    table = work.recipe.teacher
    if table.architecture is not None:
        return table.architecture.family
    assert table.model is not None
    folder = folder_of(work, table.model, table.revision)
    return None if folder is None else family_of_model(folder)


def student_family(work: Work, student: StudentTable) -> str | None:
    """A student's `model_type`; None if its model is not on this machine."""
    if student.architecture is not None:
        return student.architecture.family
    if student.model is None:
        return teacher_family(work)
    folder = folder_of(work, student.model)
    return None if folder is None else family_of_model(folder)


def teacher_sizes(work: Work) -> ModelSizes | None:
    """Sizes of the teacher; None if it is not on this machine."""
    table = work.recipe.teacher
    if table.architecture is None or table.tokenizer is None:
        assert table.model is not None
        folder = folder_of(work, table.model, table.revision)
        return None if folder is None else sizes_of_model(folder)
    vocabulary = table.tokenizer.vocabulary
    return _sizes_of_table(work, table.architecture, vocabulary, "teacher.architecture")


def student_sizes(work: Work, teacher: ModelSizes | None) -> dict[str, list[ModelSizes]]:
    """Sizes of each student in each of its trainings: one, or one after each cut. Empty if a model
    is not on this machine.

    Raises
        ColdstillError: an architecture that cannot be built, or sizes that a cut cannot reach
    """
    vocabulary = _vocabulary(work, teacher)
    table = work.recipe.teacher
    teacher_folder = None if table.model is None else folder_of(work, table.model, table.revision)
    found: dict[str, list[ModelSizes]] = {}
    for name, student in work.recipe.students.items():
        sizes: ModelSizes | None = None
        if student.architecture is not None:
            where = f"students.{name}.architecture"
            sizes = _sizes_of_table(work, student.architecture, vocabulary, where)
        elif student.layers is not None and teacher is not None:
            sizes = sizes_of_layers(teacher, student.layers, teacher_folder)
        elif student.prune is not None and teacher is not None:
            where = f"students.{name}.prune"
            found[name] = _sizes_of_cuts(work, teacher, teacher_folder, student.prune, where)
            continue
        elif student.model is not None and (folder := folder_of(work, student.model)) is not None:
            sizes = sizes_of_model(folder)
            # trained in fp32, even from a half-precision checkpoint
            sizes = None if sizes is None else replace(sizes, dtype="float32")
        found[name] = [] if sizes is None else [sizes]
    return found


def _sizes_of_cuts(
    work: Work, teacher: ModelSizes, folder: Path | None, cuts: Sequence[PruneConfig], where: str
) -> list[ModelSizes]:
    table, length = work.recipe.teacher, work.recipe.corpus.sequence_length
    if table.architecture is not None and table.tokenizer is not None:
        anatomy = anatomy_of_table(table.architecture, table.tokenizer.vocabulary, length, where)
        return sizes_of_cuts(teacher, anatomy, cuts, where)
    known = None if folder is None else anatomy_of_model(folder, where)
    return [] if known is None else sizes_of_cuts(teacher, known, cuts, where)


def _sizes_of_table(
    work: Work, table: ArchitectureConfig, vocabulary: int | None, where: str
) -> ModelSizes | None:
    # an unknown vocabulary still shows whether the model can be built
    length = work.recipe.corpus.sequence_length
    sizes = sizes_of_table(table, vocabulary or _ANY_VOCABULARY, length, where)
    return None if vocabulary is None else sizes


def _vocabulary(work: Work, teacher: ModelSizes | None) -> int | None:
    """V of the store, of the tokenizer that the recipe trains, or of the teacher's output head."""
    place = place_at(work.run.logits)
    if place.exists(MANIFEST):
        return read_manifest(place).tokenizer.size
    tokenizer = work.recipe.teacher.tokenizer
    if tokenizer is not None:
        return tokenizer.vocabulary
    return None if teacher is None else teacher.vocabulary
