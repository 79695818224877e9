"""How a student leaves: one file a format, one line below.

A format writes a student into a folder, and opens what lies there with the runtime that such files
are made for (`contract.py`). Whatever it is, it counts as done only when its own runtime gives the
student's logits again on held-out text (`fidelity.py`), within the limits that the format states.
What is quantised was checked before that, within the limits of what it is quantised from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gguf.format import Gguf
from .hf import HuggingFace
from .onnx.format import Onnx
from .torchao import TorchAo

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
