"""Memory that each stage will need, from sizes alone (`stages.planning.memory` has the rules)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.places.opening import place_at
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...stages.report import silent
from ..steps.work import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...stages.config import ArchitectureConfig, LayersConfig, LoraConfig, TrainConfig
    from ...stages.planning.model_sizes import ModelSizes
    from ...stages.students.pruning.config import PruneConfig
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run
    from ..recipe.tables import StudentTable

_ANY_VOCABULARY = 1024
Memory = dict[str, int | None]
"""Stage to bytes; None where a model is not on this machine."""


def memory(loaded: LoadedRecipe, run: Run) -> Memory:
    """About how many bytes each stage of a recipe takes. Loads no weights.

    Raises
        ColdstillError: an architecture that cannot be built
    """
    from ...stages.planning.memory import capture_memory

    read_at_once = 8192  # tokens of the sample on which a cut is measured

    recipe = loaded.recipe
    length = recipe.corpus.sequence_length
    teacher = teacher_sizes(loaded, run)
    found: Memory = {}
    if recipe.teacher.train is not None:
        found["train-teacher"] = _training(
            teacher, recipe.teacher.train, length, lora=recipe.teacher.lora
        )
    found["teacher-logits"] = (
        None
        if teacher is None
        else capture_memory(teacher, recipe.teacher.dtype, recipe.logits.batch_tokens, length)
    )
    for name, sizes in student_sizes(loaded, run, teacher, first=True).items():
        student = recipe.students[name]
        if student.prune:
            found[f"prune-student {name}"] = (
                None if teacher is None else capture_memory(teacher, "auto", read_at_once, length)
            )
        found[f"train-student {name}"] = _training(sizes, student.train, length, lora=student.lora)
    return found


def student_sizes(
    loaded: LoadedRecipe,
    run: Run,
    teacher: ModelSizes | None = None,
    *,
    first: bool = False,
) -> dict[str, ModelSizes | None]:
    """What decides how large each student is; None where a model is not on this machine.

    teacher  the same of the teacher, where the caller has it at hand
    first    of one that is cut several times, as it is trained first; as it ends up otherwise

    Raises
        ColdstillError: an architecture that cannot be built, sizes that a cut cannot reach
    """
    recipe = loaded.recipe
    teacher = teacher or teacher_sizes(loaded, run)
    vocabulary = vocabulary_of(loaded, run, teacher)
    found: dict[str, ModelSizes | None] = {}
    for name, student in recipe.students.items():
        if student.architecture is not None:
            length = recipe.corpus.sequence_length
            where = f"students.{name}.architecture"
            found[name] = _of_table(student.architecture, vocabulary, length, where)
        elif student.layers is not None:
            found[name] = _of_layers(loaded, run, teacher, student.layers)
        elif student.prune is not None:
            cuts = _of_cuts(loaded, run, teacher, student.prune, f"students.{name}.prune")
            found[name] = None if cuts is None else cuts[0 if first else -1]
        else:
            assert student.model is not None
            sizes = _of_model(loaded, run, student.model)
            # whatever it is kept in, it is trained in fp32
            found[name] = None if sizes is None else replace(sizes, dtype="float32")
    return found


def student_family(loaded: LoadedRecipe, run: Run, student: StudentTable) -> str | None:
    """What transformers calls a student's kind; None where its model is not on this machine."""
    from ...stages.planning.model_sizes import family_of_model

    teacher = loaded.recipe.teacher
    if student.architecture is not None:
        return student.architecture.family
    if student.model is None and teacher.architecture is not None:
        return teacher.architecture.family
    name, revision = (
        (student.model, "main") if student.model is not None else (teacher.model, teacher.revision)
    )
    assert name is not None
    try:
        return family_of_model(Work(loaded, run, silent).local(name), revision)
    except ColdstillError:
        return None


def vocabulary_of(loaded: LoadedRecipe, run: Run, teacher: ModelSizes | None) -> int | None:
    """V: of the store, of the tokenizer that is made here, else the rows of the teacher's head."""
    place = place_at(run.logits)
    if place.exists(MANIFEST):
        return read_manifest(place).tokenizer.size
    tokenizer = loaded.recipe.teacher.tokenizer
    if tokenizer is not None:
        return tokenizer.vocabulary
    return None if teacher is None else teacher.vocabulary


def teacher_sizes(loaded: LoadedRecipe, run: Run) -> ModelSizes | None:
    """What decides how large the teacher is; None where it is not on this machine."""
    table = loaded.recipe.teacher
    if table.architecture is None or table.tokenizer is None:
        assert table.model is not None
        return _of_model(loaded, run, table.model, table.revision)
    length = loaded.recipe.corpus.sequence_length
    vocabulary = table.tokenizer.vocabulary
    return _of_table(table.architecture, vocabulary, length, "teacher.architecture")


def _of_model(
    loaded: LoadedRecipe, run: Run, model: str, revision: str = "main"
) -> ModelSizes | None:
    from ...stages.planning.model_sizes import sizes_of_model

    try:
        return sizes_of_model(Work(loaded, run, silent).local(model), revision)
    except ColdstillError:
        return None  # a folder that is not there: told by whoever loads it


def _of_layers(
    loaded: LoadedRecipe, run: Run, teacher: ModelSizes | None, layers: LayersConfig
) -> ModelSizes | None:
    from ...stages.planning.model_sizes import sizes_of_layers

    if teacher is None:
        return None
    table = loaded.recipe.teacher
    try:
        lies = None if table.model is None else Work(loaded, run, silent).local(table.model)
    except ColdstillError:
        return None
    return sizes_of_layers(teacher, layers, lies, table.revision)


def _of_cuts(
    loaded: LoadedRecipe,
    run: Run,
    teacher: ModelSizes | None,
    cuts: Sequence[PruneConfig],
    where: str,
) -> list[ModelSizes] | None:
    from ...stages.planning.pruned_sizes import (
        anatomy_of_model,
        anatomy_of_table,
        sizes_of_cuts,
    )

    if teacher is None:
        return None
    table, length = loaded.recipe.teacher, loaded.recipe.corpus.sequence_length
    if table.architecture is not None and table.tokenizer is not None:
        anatomy = anatomy_of_table(table.architecture, table.tokenizer.vocabulary, length, where)
        return sizes_of_cuts(teacher, anatomy, cuts, where)
    assert table.model is not None
    known = anatomy_of_model(Work(loaded, run, silent).local(table.model), table.revision, where)
    return None if known is None else sizes_of_cuts(teacher, known, cuts, where)


def _of_table(
    table: ArchitectureConfig, vocabulary: int | None, length: int, where: str
) -> ModelSizes | None:
    from ...stages.planning.model_sizes import sizes_of_table

    # with any vocabulary it is known whether it can be built
    sizes = sizes_of_table(table, vocabulary or _ANY_VOCABULARY, length, where)
    return None if vocabulary is None else sizes


def _training(
    sizes: ModelSizes | None,
    config: TrainConfig,
    length: int,
    *,
    lora: LoraConfig | None = None,
) -> int | None:
    from ...stages.planning.memory import training_memory
    from ...stages.planning.model_sizes import adapter_parameters

    if sizes is None:
        return None
    batch = min(config.batch_tokens, config.micro_batch_tokens or config.batch_tokens)
    return training_memory(
        sizes,
        config.precision,
        batch,
        length,
        frozen=lora is not None,
        adapters=0 if lora is None else adapter_parameters(sizes, lora.rank),
        again=config.gradient_checkpointing,
    )
