"""Writes a model as one GGUF file in f16, with the `gguf` package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from ....data.errors import ColdstillError
from ...models.ends import names, own_ends
from .architectures import ARCHITECTURES, Architecture, rotary, window
from .q8 import write_file
from .tokens import END_SLOTS, add_tokens, end_slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..contract import LoadedStudent

_ALWAYS_F32 = ("position_embd.weight",)
"""Matrices that stay in f32 in llama.cpp's own files."""


def write_gguf(student: LoadedStudent, path: Path) -> Sequence[str]:
    """Write the file, and return notes about what differs from the student.

    Raises
        ColdstillError: llama.cpp has no name for a tensor
    """
    model, architecture = student.model, ARCHITECTURES[student.family]
    settings = architecture.settings(model.config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(student.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**settings, "vocab_size": student.vocabulary}.items():
        _add(writer, f"{architecture.name}.{key}", value)
    ends = end_slots(student.tokenizer, own_ends(model), student.ends.tokens)
    add_tokens(writer, student.tokenizer, student.vocabulary, ends[:END_SLOTS])
    for name, tensor in _tensors(student, architecture):
        kind = gguf.GGMLQuantizationType.F16
        if tensor.ndim == 1 or name in _ALWAYS_F32:
            kind = gguf.GGMLQuantizationType.F32
        content = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
        writer.add_tensor(name, content, raw_dtype=kind)
    write_file(writer)
    notes = []
    size = window(model.config)
    if "attention.sliding_window" not in settings and size == settings["context_length"]:
        notes.append(
            f"its context is {size:,} tokens, that of its sliding window, and it was checked "
            "within it: llama.cpp has no sliding window for this family"
        )
    if left_out := ends[END_SLOTS:]:
        notes.append(
            f"a GGUF file can name {END_SLOTS} tokens at which llama.cpp stops; not among them: "
            f"{names(student.tokenizer, left_out)}; pass their text as further stops (-r, or stop=)"
        )
    return notes


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _tensors(
    student: LoadedStudent, architecture: Architecture
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor in llama.cpp's layout, with llama.cpp's name."""
    model, config = student.model, student.model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    # a tied matrix has two names
    for name, weight in model.named_parameters(remove_duplicate=False):
        of_head = weight is head and not name.startswith(model.base_model_prefix)
        if of_head and head is embedding and architecture.may_tie:
            continue
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ColdstillError(
                f"students.{student.name}: llama.cpp has no name for the tensor {name} of a "
                f"{student.family!r} model"
            )
        yield theirs, architecture.change(name, weight.detach().float().numpy(), config)
    factors = _rotary_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _rotary_factors(model: Any) -> NDArray[np.float32] | None:
    """[D / 2] divisors of the rotary frequencies; None for unscaled frequencies."""
    kinds = {rope.get("rope_type", "default") for rope in rotary(model.config)}
    if kinds <= {"default"}:
        return None
    (rope,) = rotary(model.config)
    scaled = model.base_model.rotary_emb.inv_freq.float().numpy()
    places = np.arange(len(scaled)) / len(scaled)
    plain = float(rope["rope_theta"]) ** -places
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors
