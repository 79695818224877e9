"""A model as one GGUF file in f16, through the `gguf` package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from ....data.errors import ColdstillError
from ...models.ends import names, own_ends
from .families import Family, family_of, rotary, window
from .tokens import END_SLOTS, add_tokens, end_slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..contract import Source

_ALWAYS_F32 = ("position_embd.weight",)
"""As llama.cpp's own files have it."""


def write_gguf(source: Source, path: Path) -> Sequence[str]:
    """Write the file; sentences on what is not as in the student.

    Raises
        ColdstillError: a tensor that llama.cpp has no name for
    """
    model, family = source.model, family_of(source.model)
    facts = family.facts(model.config)
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_name(source.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**facts, "vocab_size": source.vocabulary}.items():
        _add(writer, f"{family.architecture}.{key}", value)
    ends = end_slots(source.tokenizer, own_ends(model), source.ends.tokens)
    add_tokens(writer, source.tokenizer, source.vocabulary, ends[:END_SLOTS])
    for name, tensor in _tensors(source, family):
        kind = gguf.GGMLQuantizationType.F16
        if tensor.ndim == 1 or name in _ALWAYS_F32:
            kind = gguf.GGMLQuantizationType.F32
        content = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
        writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [*_notes(model.config, facts), *_left_out(source, ends[END_SLOTS:])]


def _left_out(source: Source, ends: Sequence[int]) -> list[str]:
    if not ends:
        return []
    return [
        f"such a file names {END_SLOTS} tokens at which llama.cpp stops; not among them: "
        f"{names(source.tokenizer, ends)}; give their text as further stops (-r, or stop=)"
    ]


def _notes(config: Any, facts: dict[str, Any]) -> list[str]:
    if "attention.sliding_window" in facts or window(config) != facts["context_length"]:
        return []
    return [
        f"its context is {window(config):,} tokens, that of its sliding window, and it was checked "
        "within it: llama.cpp has no such window for this family"
    ]


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _tensors(source: Source, family: Family) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor by llama.cpp's name, laid out as it wants it."""
    model, config = source.model, source.model.config
    architecture = next(
        each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    # both names of a shared matrix
    for name, weight in model.named_parameters(remove_duplicate=False):
        of_head = weight is head and not name.startswith(model.base_model_prefix)
        if of_head and head is embedding and family.may_tie:
            continue
        tensor = weight.detach().float().numpy()
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ColdstillError(
                f"students.{source.name}: llama.cpp has no name for the tensor {name} of a "
                f"{source.family!r} model"
            )
        yield known, family.change(name, tensor, config)
    factors = _rotary_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _rotary_factors(model: Any) -> NDArray[np.float32] | None:
    """[D / 2] what each rotary frequency is divided by, where they are not the plain ones."""
    kinds = {rope.get("rope_type", "default") for rope in rotary(model.config)}
    if kinds <= {"default"}:
        return None
    (rope,) = rotary(model.config)
    scaled = model.base_model.rotary_emb.inv_freq.float().numpy()
    places = np.arange(len(scaled)) / len(scaled)
    plain = float(rope["rope_theta"]) ** -places
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors
