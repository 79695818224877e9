"""A GGUF file in q8_0, made of one in f16: same settings, tokens and names, smaller matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ROW = 32
"""Weights that share a scale lie in one row."""
_OWN = ("GGUF.", "general.architecture", "general.file_type")
"""Keys that the writer writes by itself, and the one that changes."""


def quantise(whole: Path, path: Path) -> Sequence[str]:
    """Write the q8_0 form of an f16 file; sentences on what stays as it was."""
    reader = gguf.GGUFReader(whole)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for key, field in reader.fields.items():
        if not key.startswith(_OWN):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    kept = 0
    for tensor in reader.tensors:
        content, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.F16:
            if content.shape[-1] % _ROW:
                kept += 1
            else:
                content, kind = _rounded(tensor), gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [f"{kept} matrices stay f16: their rows are no multiple of {_ROW} long"] if kept else []


def _rounded(tensor: Any) -> Any:
    weights = gguf.dequantize(tensor.data, tensor.tensor_type)
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
