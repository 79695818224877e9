"""Sizes of a model, from its files or its recipe table. Loads no weights.

Reads configurations and the headers of weight files, and counts the usual families by formula. A
table of another family is built on torch's `meta` device; only that loads torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ..models.model_files import size_in, weight_files_in
from ..students.pruning.anatomy import FAMILIES, anatomy_of
from ..students.pruning.shapes import all_target_sizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..config import ArchitectureConfig, LayersConfig
    from ..students.pruning.anatomy import Anatomy, Shapes
    from ..students.pruning.config import PruneConfig

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per number, by the names used in configurations and recipes."""
_COUNTED_FAMILIES = {"llama", "mistral"}
"""Families without biases, with two norms per layer and one after the last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The numbers of a model that decide how much memory it takes."""

    parameters: int
    hidden: int
    """D, width of the residual stream."""
    feed_forward: int
    """F, width of the feed-forward layer."""
    layers: int
    vocabulary: int
    """Rows of the output head, including padding rows."""
    activation: str = "silu"
    """Activation of the feed-forward layer; some take several steps and more memory."""
    dtype: str = "float32"
    """Precision of the weights on disk."""
    tied: bool = True
    """Whether input and output embeddings are one matrix."""


def model_folder(name: str, revision: str = "main") -> Path | None:
    """The folder of a model: a folder itself, or the local copy of a hub model; None if there is no
    local copy. Uses no network."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def tensor_shapes(files: Iterable[Path]) -> Shapes:
    """Shapes of all tensors in safetensors files, by name, from the headers.

    Raises
        ValueError: a file is damaged
    """
    from safetensors import SafetensorError, safe_open

    found: Shapes = {}
    for path in files:
        try:
            with safe_open(path, "np") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    found[key] = tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    return found


def sizes_of_model(folder: Path) -> ModelSizes | None:
    """Sizes of the model in a folder; None if its files are incomplete or damaged: loading it will
    report that."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}
        hidden, layers, feed_forward = (
            size_in(config, key) for key in ("hidden", "layers", "feed_forward")
        )
        vocabulary = int(config.get("vocab_size") or 0)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        parameters = _parameters(folder, WIDTHS.get(dtype, 4))
    except (ColdstillError, OSError, ValueError, AttributeError, TypeError):
        return None
    if not (hidden and layers and vocabulary and parameters):
        return None
    return ModelSizes(
        parameters=parameters,
        hidden=hidden,
        feed_forward=feed_forward or 4 * hidden,
        layers=layers,
        vocabulary=vocabulary,
        activation=_activation(config),
        dtype=dtype,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def family_of_model(folder: Path) -> str | None:
    """The `model_type` of the model in a folder; None if its configuration has none."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sizes_of_table(
    architecture: ArchitectureConfig,
    vocabulary: int,
    sequence_length: int,
    where: str = "architecture",
) -> ModelSizes:
    """Sizes of a new model that a recipe's table describes; raises as `build_model`."""
    hidden, heads = architecture.hidden, architecture.heads
    kv_heads = architecture.kv_heads or heads
    if architecture.family not in _COUNTED_FAMILIES or hidden % heads or heads % kv_heads:
        return _sizes_of_built(architecture, vocabulary, sequence_length, where)
    feed_forward = architecture.feed_forward or -(-hidden * 8 // (3 * 32)) * 32
    keys_values = kv_heads * (hidden // heads)
    layer = 2 * hidden * (hidden + keys_values) + 3 * hidden * feed_forward + 2 * hidden
    embeddings = (1 if architecture.tied else 2) * vocabulary * hidden
    return ModelSizes(
        parameters=embeddings + architecture.layers * layer + hidden,
        hidden=hidden,
        feed_forward=feed_forward,
        layers=architecture.layers,
        vocabulary=vocabulary,
        tied=architecture.tied,
    )


def unused_size(architecture: ArchitectureConfig, where: str) -> str | None:
    """A note on a size that the family ignores, or None."""
    if architecture.family in _COUNTED_FAMILIES:
        return None
    from ..models.building import unused_heads

    return unused_heads(architecture, where)


def sizes_of_layers(
    teacher: ModelSizes, layers: LayersConfig, folder: Path | None = None
) -> ModelSizes | None:
    """Sizes of a student made of some layers of a teacher; None if the teacher has too few layers.

    folder  the teacher's files: parameters are then counted layer by layer. Without it all layers
            are taken as equal, and everything outside them as embeddings and one norm.
    """
    try:
        keep = layers.chosen(teacher.layers, "")
    except ColdstillError:
        return None  # training will report it
    files = [] if folder is None else _safetensors_in(folder)
    if files:
        layer_of = re.compile(r"\.(\d+)\.")  # the first number in a tensor's name
        parameters = sum(
            math.prod(shape)
            for name, shape in tensor_shapes(files).items()
            if (layer := layer_of.search(name)) is None or int(layer[1]) in keep
        )
    else:
        tables = 1 if teacher.tied else 2
        outside = tables * teacher.vocabulary * teacher.hidden + teacher.hidden
        parameters = outside + (teacher.parameters - outside) * len(keep) // teacher.layers
    return replace(teacher, parameters=parameters, layers=len(keep), dtype="float32")


def adapter_parameters(sizes: ModelSizes, rank: int) -> int:
    """Estimated number of adapter weights on all linear layers: `rank` rows and columns for four
    matrices of D x D and three of D x F in every layer."""
    per_layer = 4 * 2 * sizes.hidden + 3 * (sizes.hidden + sizes.feed_forward)
    return sizes.layers * rank * per_layer


def sizes_of_cuts(
    teacher: ModelSizes, anatomy: Anatomy, cuts: Sequence[PruneConfig], where: str
) -> list[ModelSizes]:
    """Sizes of the pruned model after each cut."""
    parameters = anatomy.parameters(anatomy.sizes)
    return [
        replace(
            teacher,
            parameters=anatomy.parameters(sizes),
            hidden=sizes.hidden,
            feed_forward=sizes.feed_forward,
            layers=sizes.layers,
            dtype="float32",
        )
        for sizes in all_target_sizes(anatomy, cuts, parameters, where)
    ]


def anatomy_of_model(folder: Path, where: str) -> Anatomy | None:
    """Anatomy of the model in a folder, from the headers of its weight files; None if these are
    missing or damaged.
    """
    try:
        files = _safetensors_in(folder)
        if not files:
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family, heads = config["model_type"], size_in(config, "heads")
        shapes = tensor_shapes(files)
    except (ColdstillError, OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # loading the model will report it
    return anatomy_of(family, heads, _parameters_only(family, shapes), where)


def anatomy_of_table(
    architecture: ArchitectureConfig, vocabulary: int, sequence_length: int, where: str
) -> Anatomy:
    """Anatomy of a new model that a recipe's table describes."""
    model = _meta_model(architecture, vocabulary, sequence_length, "teacher.architecture")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = size_in(model.config.to_dict(), "heads")
    return anatomy_of(model.config.model_type, heads, shapes, where)


def _parameters_only(family: str, shapes: Shapes) -> Shapes:
    """Shapes of the parameters, under their names in a loaded model. Older files omit the first
    part of the name and also hold attention masks."""
    layout = FAMILIES.get(family)
    if layout is None:
        return shapes
    base = layout.layers.partition(".")[0]
    inside = re.compile(rf"{re.escape(layout.layers)}\.\d+\.(.+)")
    found: Shapes = {}
    for key, shape in shapes.items():
        for full in (key, f"{base}.{key}"):
            match = inside.fullmatch(full)
            if full in layout.outside or (match is not None and match[1] in layout.inside):
                found[full] = shape
                break
    return found


def _meta_model(
    architecture: ArchitectureConfig, vocabulary: int, sequence_length: int, where: str
) -> Any:
    """A model on torch's `meta` device, with shapes but no storage; raises as `build_model`."""
    import torch

    from ..models.building import build_model

    tokenizer = SimpleNamespace(  # the attributes that `build_model` reads
        get_vocab=lambda: {"": vocabulary - 1},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        return build_model(architecture, tokenizer, sequence_length, 0, where)


def _sizes_of_built(
    architecture: ArchitectureConfig, vocabulary: int, sequence_length: int, where: str
) -> ModelSizes:
    from ..models.building import feed_forward_width

    model = _meta_model(architecture, vocabulary, sequence_length, where)
    return ModelSizes(
        parameters=model.num_parameters(),
        hidden=architecture.hidden,
        feed_forward=feed_forward_width(model),
        layers=architecture.layers,
        vocabulary=vocabulary,
        tied=architecture.tied,
        activation=_activation(model.config.get_text_config().to_dict()),
    )


def _activation(config: dict[str, Any]) -> str:
    return str(config.get("hidden_act") or config.get("activation_function") or "silu")


def _parameters(folder: Path, width: int) -> int:
    """Number of weights, from the headers of safetensors files or from the size of older files."""
    if files := _safetensors_in(folder):
        return sum(math.prod(shape) for shape in tensor_shapes(files).values())
    return sum(path.stat().st_size for path in weight_files_in(folder)) // width


def _safetensors_in(folder: Path) -> list[Path]:
    return [path for path in weight_files_in(folder) if path.suffix == ".safetensors"]
