"""ONNX with a key-value cache, for onnxruntime: in fp32, or with int8 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...libraries import asking
from ..contract import Format, Limits

if TYPE_CHECKING:
    from pathlib import Path

    from ..contract import LoadedStudent, Runtime

FILE = "model.onnx"
_USAGE = """\
Needs `pip install onnxruntime transformers`.

```python
import numpy as np
from onnxruntime import InferenceSession
from transformers import GenerationConfig, PreTrainedTokenizerFast

folder = "."  # the folder of this page
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
ends = GenerationConfig.from_pretrained(folder).eos_token_id
session = InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
cache = {
    each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
    for each in session.get_inputs()
    if each.name.startswith("past_key_values")
}
text = tokenizer("Once").input_ids
new, past = text, 0
for _ in range(50):
    inputs = {
        "input_ids": np.array([new]),
        "attention_mask": np.ones((1, past + len(new)), np.int64),
        "position_ids": np.arange(past, past + len(new))[None],
    }
    found = dict(zip(names, session.run(names, inputs | cache)))
    past += len(new)
    new = [int(found.pop("logits")[0, -1].argmax())]
    cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    text += new
    if new[0] in np.atleast_1d(ends):
        break
print(tokenizer.decode(text))
```
"""


@dataclass(frozen=True)
class Onnx(Format):
    """One graph for the prompt and for every token after it, with a key-value cache.

    Inputs: `input_ids` `[batch, sequence]`, `attention_mask` `[batch, past + sequence]`,
    `position_ids` `[batch, sequence]`, `past_key_values.N.key` and `.value` `[batch, heads, past,
    head]`, where past is 0 at the beginning. Outputs: `logits`, `present.N.key` and `.value`.
    """

    int8: bool = False
    library: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    weights: ClassVar[str] = f"{FILE}*"

    @property
    def base(self) -> str | None:
        return "onnx" if self.int8 else None

    @property
    def limits(self) -> Limits:
        """fp32 differs by rounding only. int8 also rounds the inputs of every product.

        measured: fp32 differed by up to 8e-5, KL 1e-11, agreement 100%; int8 (students of
        SmolLM2-135M) by up to 2.2 for very improbable tokens, KL 4e-3, just cut 1e-2, 96.5%.
        """
        if self.int8:
            return Limits(logprob=8.0, kl=5e-2, share=1e-2, cached=8.0, agreement=0.88)
        return Limits(logprob=1e-3, kl=1e-6, share=1e-6, cached=1e-3, agreement=0.995)

    def usage(self, name: str) -> str:
        return _USAGE

    def refusal(self, student: LoadedStudent) -> str | None:
        """The graph holds the cache of plain attention only."""
        from .program import cache_shapes

        if cache_shapes(student.model) is None:
            return f"a {student.family!r} model has no plain key-value cache; use --to hf"
        return None

    def write(
        self, student: LoadedStudent, folder: Path, base: Path | None = None
    ) -> tuple[str, ...]:
        """Trace the student, or quantise the traced graph. Add tokenizer and settings."""
        from .int8 import quantise
        from .program import write_program

        if self.int8:
            assert base is not None
            where = f"students.{student.name}"
            with asking("onnxruntime", "quantise it", where=where, remedy="use --to onnx"):
                quantise(base / FILE, folder / FILE)
        else:
            write_program(student.model, folder / FILE, student.name)
        student.model.config.save_pretrained(folder)
        if student.model.generation_config is not None:
            student.model.generation_config.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        return ()

    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        from .program import OnnxRuntime

        return OnnxRuntime.load(folder / FILE)
