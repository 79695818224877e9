"""How large a model is, from its files or its table, before anybody makes or loads it.

Loads no torch where it can do without: headers of weight files and configurations are read as they
are, and the usual families are counted by their formula. Others are built without memory.
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
from ..models.known_families import size_in
from ..models.weight_files import weight_files_in

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..config import ArchitectureConfig, LayersConfig

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number, by the names that configurations and recipes use."""
_PLAIN_FAMILIES = {"llama", "mistral"}
"""Without biases, or norms besides two to a layer and one at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Those numbers of a model that decide how much memory it takes."""

    parameters: int
    hidden: int
    """D, width of the residual stream."""
    feed_forward: int
    """F, width of the feed-forward layer."""
    layers: int
    vocabulary: int
    """Rows of the output head, padding among them."""
    activation: str = "silu"
    """Of the feed-forward layer: some are computed in many steps."""
    dtype: str = "float32"
    """What its weights are kept in on disk."""
    tied: bool = True
    """Whether input and output embeddings are one matrix."""


def sizes_of_table(
    architecture: ArchitectureConfig,
    vocabulary: int,
    sequence_length: int,
    where: str = "architecture",
) -> ModelSizes:
    """Of a model that the recipe makes; raises as `stages.models.building.build_model`.

    where  the recipe's table, for messages
    """
    if architecture.family not in _PLAIN_FAMILIES or not _divides(architecture):
        return _built_without_memory(architecture, vocabulary, sequence_length, where)
    hidden, heads = architecture.hidden, architecture.heads
    feed_forward = architecture.feed_forward or -(-hidden * 8 // (3 * 32)) * 32
    keys_values = (architecture.kv_heads or heads) * (hidden // heads)
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


def sizes_of_model(name: str, revision: str = "main") -> ModelSizes | None:
    """Of a model in a folder, or of a hub name that was fetched before; None if it is not on this
    machine or does not say. Never asks the network."""
    folder = model_folder(name, revision)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}
        found = {key: size_in(config, key) for key in ("hidden", "layers", "feed_forward")}
        found["vocabulary"] = int(config.get("vocab_size") or 0)
        width = WIDTHS.get(dtype := _dtype(config), 4)
        parameters = _parameters(folder, width)
    except (ColdstillError, OSError, ValueError, AttributeError, TypeError):
        return None  # whoever loads it will tell what is wrong with it
    hidden, layers, vocabulary = (found[key] for key in ("hidden", "layers", "vocabulary"))
    if not (hidden and layers and vocabulary and parameters):
        return None
    return ModelSizes(
        parameters=parameters,
        hidden=hidden,
        feed_forward=found["feed_forward"] or 4 * hidden,
        layers=layers,
        vocabulary=vocabulary,
        activation=str(config.get("hidden_act") or config.get("activation_function") or "silu"),
        dtype=dtype,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def family_of_model(name: str, revision: str = "main") -> str | None:
    """What the configuration of a model on this machine says it is; None if it is not here."""
    folder = model_folder(name, revision)
    if folder is None:
        return None
    try:
        family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(family)


def sizes_of_layers(
    whole: ModelSizes, layers: LayersConfig, name: str | None = None, revision: str = "main"
) -> ModelSizes | None:
    """Of a student that is some of the layers of a model with these sizes; None if the model has
    not that many.

    name  where the model lies, if it does: then weights are counted layer by layer. Otherwise all
          layers are alike, and what is outside them are the embeddings and a norm.
    """
    try:
        keep = layers.chosen(whole.layers, "")
    except ColdstillError:
        return None  # whoever trains it will tell
    folder = None if name is None else model_folder(name, revision)
    files = [] if folder is None else weight_files_in(folder)
    if files and files[0].suffix == ".safetensors":
        gone = set(range(whole.layers)) - set(keep)
        parameters = sum(_count(path, gone) for path in files)
    else:
        tables = 1 if whole.tied else 2
        outside = tables * whole.vocabulary * whole.hidden + whole.hidden
        parameters = outside + (whole.parameters - outside) * len(keep) // whole.layers
    return replace(whole, parameters=parameters, layers=len(keep), dtype="float32")


def adapter_parameters(sizes: ModelSizes, rank: int) -> int:
    """About how many weights adapters on all linear layers have: `rank` rows and columns for four
    matrices of D x D and three of D x F in every layer."""
    per_layer = 4 * 2 * sizes.hidden + 3 * (sizes.hidden + sizes.feed_forward)
    return sizes.layers * rank * per_layer


def model_without_memory(
    architecture: ArchitectureConfig,
    vocabulary: int,
    sequence_length: int,
    where: str = "architecture",
) -> Any:
    """A model of any family on torch's `meta` device, which has shapes and no storage; raises as
    `stages.models.building.build_model`."""
    import torch

    from ..models.building import build_model

    tokenizer = SimpleNamespace(  # all that is asked of one here
        get_vocab=lambda: {"": vocabulary - 1},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        return build_model(architecture, tokenizer, sequence_length, 0, where)


def _built_without_memory(
    architecture: ArchitectureConfig, vocabulary: int, sequence_length: int, where: str
) -> ModelSizes:
    from ..models.building import feed_forward_width

    model = model_without_memory(architecture, vocabulary, sequence_length, where)
    config = model.config.get_text_config().to_dict()
    return ModelSizes(
        parameters=model.num_parameters(),
        hidden=architecture.hidden,
        feed_forward=feed_forward_width(model),
        layers=architecture.layers,
        vocabulary=vocabulary,
        tied=architecture.tied,
        activation=str(config.get("hidden_act") or config.get("activation_function") or "silu"),
    )


def unused_size(architecture: ArchitectureConfig, where: str) -> str | None:
    """A note on a size that the family has no use for, or None."""
    if architecture.family in _PLAIN_FAMILIES:
        return None
    from ..models.building import unused_heads

    return unused_heads(architecture, where)


def _divides(architecture: ArchitectureConfig) -> bool:
    heads = architecture.heads
    whole = architecture.hidden % heads == 0
    return whole and heads % (architecture.kv_heads or heads) == 0


def model_folder(name: str, revision: str) -> Path | None:
    """Where a model lies on this machine, if it does. Never asks the network."""
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


def _dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _parameters(folder: Path, width: int) -> int:
    """From the headers of its weight files; of older ones, which have none, from their size."""
    files = weight_files_in(folder)
    if files and files[0].suffix == ".safetensors":
        return sum(_count(path) for path in files)
    return sum(path.stat().st_size for path in files) // width


def _count(path: Path, without: Collection[int] = ()) -> int:
    """Numbers in a file, but for those of these layers: the first number in a tensor's name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as tensors:
            return sum(
                math.prod(tensors.get_slice(key).get_shape())
                for key in tensors.keys()  # noqa: SIM118
                if (layer := re.search(r"\.(\d+)\.", key)) is None or int(layer[1]) not in without
            )
    except SafetensorError as error:
        raise ValueError(str(error)) from error
