"""Exports of students to other runtimes: one class for each format, registered below.

A format writes a student into a folder and opens the files with the runtime that they are made for
(`contract.py`). An export is kept only if that runtime reproduces the student's logits on held-out
text within the limits of the format (`checks.py`). Before a quantised export, its unquantised
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
    "gguf-q4_0": Gguf("q4_0"),
    "torchao-int8": TorchAo(),
}
"""All formats by name."""

WITHOUT_PLAIN_CACHE = frozenset(
    {
        "bailing_hybrid", "dory", "falcon_mamba", "jamba", "lara_mini", "lfm3", "mamba",
        "megatron-bert", "minimax", "olmo_hybrid", "openai-gpt", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rembert", "roc_bert",
        "rwkv", "xlstm",
    }
)  # fmt: skip
"""Families whose cache is not one key and one value tensor for each layer, the inputs and outputs
of an ONNX graph. The export itself inspects the model."""

_SAME_AS = {"gpt-sw3": "gpt2"}
"""Names of transformers for models of another family."""


def unable(family: str, formats: tuple[str, ...]) -> list[str]:
    """Those of the formats that cannot hold any student of this family.

    It is known by name, before a student is trained.
    """
    from .gguf.architectures import ARCHITECTURES

    family = _SAME_AS.get(family, family)
    return [
        name
        for name in formats
        if (name.startswith("gguf") and family not in ARCHITECTURES)
        or (name.startswith("onnx") and family in WITHOUT_PLAIN_CACHE)
    ]
