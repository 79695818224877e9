"""How large a pruned student will be, before its teacher is loaded or even made."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ..models.known_families import size_in
from ..models.weight_files import weight_files_in
from ..students.pruning.anatomy import anatomy_of
from ..students.pruning.families import FAMILIES
from ..students.pruning.shapes import all_target_sizes
from .model_sizes import model_folder, model_without_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..config import ArchitectureConfig
    from ..students.pruning.anatomy import Anatomy, Shapes
    from ..students.pruning.config import PruneConfig
    from .model_sizes import ModelSizes


def sizes_of_cuts(
    whole: ModelSizes, anatomy: Anatomy, cuts: Sequence[PruneConfig], where: str
) -> list[ModelSizes]:
    """Of what is left of a model with these sizes after each cut.

    Raises
        ColdstillError: sizes that the cuts cannot reach
    """
    teacher = anatomy.parameters(anatomy.sizes)
    return [
        replace(
            whole,
            parameters=anatomy.parameters(sizes),
            hidden=sizes.hidden,
            feed_forward=sizes.feed_forward,
            layers=sizes.layers,
            dtype="float32",
        )
        for sizes in all_target_sizes(anatomy, cuts, teacher, where)
    ]


def anatomy_of_model(name: str, revision: str, where: str) -> Anatomy | None:
    """Of a model in a folder, or of a hub name that was fetched before, from the headers of its
    weight files; None if it is not on this machine or has none.

    Raises
        ColdstillError: a family that cannot be pruned
    """
    folder = model_folder(name, revision)
    if folder is None:
        return None
    try:
        files = [path for path in weight_files_in(folder) if path.suffix == ".safetensors"]
        if not files:
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = config["model_type"]
        heads = size_in(config, "heads")
        shapes = {key: shape for path in files for key, shape in _headers(path).items()}
    except (ColdstillError, OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # whoever loads it will tell what is wrong with it
    return anatomy_of(family, heads, _known(family, shapes), where)


def anatomy_of_table(
    architecture: ArchitectureConfig, vocabulary: int, sequence_length: int, where: str
) -> Anatomy:
    """Of a model that the recipe makes.

    Raises
        ColdstillError: a family that cannot be pruned, or as `stages.models.building.build_model`
    """
    model = model_without_memory(architecture, vocabulary, sequence_length, "teacher.architecture")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = size_in(model.config.to_dict(), "heads")
    return anatomy_of(model.config.model_type, heads, shapes, where)


def _headers(path: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as tensors:
            names: Any = tensors.keys()
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _known(name: str, shapes: Shapes) -> Shapes:
    """Under the names that tensors have in a loaded model, without what is no parameter: older
    files leave out the first word, and hold masks."""
    family = FAMILIES.get(name)
    if family is None:
        return shapes
    base = family.layers.partition(".")[0]
    inside = re.compile(rf"{re.escape(family.layers)}\.\d+\.(.+)")
    found: Shapes = {}
    for key, shape in shapes.items():
        for full in (key, f"{base}.{key}"):
            match = inside.fullmatch(full)
            if full in family.outside or (match is not None and match[1] in family.inside):
                found[full] = shape
                break
    return found
