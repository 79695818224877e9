"""Estimated memory of each stage of a recipe, by the rules of `stages.planning.memory`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...stages.planning.memory import capture_memory, training_memory
from ...stages.planning.model_sizes import adapter_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...stages.config import LoraConfig, TrainConfig
    from ...stages.planning.model_sizes import ModelSizes
    from ..recipe.tables import Recipe

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
        first = sizes[0] if sizes else None
        found[f"train-student {name}"] = _training(first, student.train, length, student.lora)
    return found


def _training(
    sizes: ModelSizes | None, config: TrainConfig, length: int, lora: LoraConfig | None
) -> int | None:
    if sizes is None:
        return None
    return training_memory(
        sizes,
        config.precision,
        min(config.batch_tokens, config.micro_batch_tokens or config.batch_tokens),
        length,
        frozen=lora is not None,
        adapters=0 if lora is None else adapter_parameters(sizes, lora.rank),
        checkpointing=config.gradient_checkpointing,
    )
