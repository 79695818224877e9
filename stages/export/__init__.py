"""Exports of students to other runtimes: one module for each format, registered below.

A format writes a student into a folder and opens the files with the runtime that they are made for
(`contract.py`). An export is kept only if that runtime reproduces the student's logits on held-out
text within the limits of the format (`fidelity.py`). Before a quantised export, its unquantised
form is checked within tighter limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gguf.format import Gguf
from .onnx.format import Onnx
from .pytorch import HuggingFace, TorchAo

if TYPE_CHECKING:
    from .contract import Format

FORMATS: dict[str, Format] = {
    "hf": HuggingFace(),
    "onnx": Onnx(),
    "onnx-int8": Onnx(int8=True),
    "gguf-f16": Gguf("f16"),
    "gguf-q8_0": Gguf("q8_0"),
    "torchao-int8": TorchAo(),
}
"""All formats by name."""
