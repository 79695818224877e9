"""Quantises a GGUF file from f16 to q8_0. Metadata, tokens and tensor names stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BLOCK = 32
"""Consecutive weights of a row that share a scale."""
_WRITTEN_ANYWAY = ("GGUF.", "general.architecture", "general.file_type")
"""Keys that the writer sets itself, and the one that changes."""


def quantise(whole: Path, path: Path) -> Sequence[str]:
    """Write the q8_0 form of an f16 file, and return a note about matrices that stay f16."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for key, field in reader.fields.items():
        if not key.startswith(_WRITTEN_ANYWAY):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    kept = 0
    f16, q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        content, kind = tensor.data, tensor.tensor_type
        if kind == f16 and content.shape[-1] % _BLOCK == 0:
            content, kind = gguf.quants.quantize(gguf.dequantize(content, f16), q8_0), q8_0
        kept += kind == f16
        writer.add_tensor(tensor.name, content, raw_dtype=kind)
    write_file(writer)
    if not kept:
        return []
    return [f"{kept} matrices stay f16: the length of their rows is not a multiple of {_BLOCK}"]


def write_file(writer: gguf.GGUFWriter) -> None:
    """Write all that was added to a writer."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
