"""ONNX with a key-value cache, for onnxruntime: in fp32, or with int8 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .contract import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .contract import Runtime, Source

FILE = "model.onnx"


@dataclass(frozen=True, slots=True)
class Onnx:
    """One graph for the first pass and for every token after it.

    In: `input_ids` `[batch, sequence]`, `attention_mask` `[batch, past + sequence]`, `position_ids`
    `[batch, sequence]`, `past_key_values.N.key` and `.value` `[batch, heads, past, head]`, of
    length 0 to begin with. Out: `logits`, `present.N.key` and `.value`.
    """

    int8: bool = False
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    weights: ClassVar[str] = f"{FILE}*"

    @property
    def limits(self) -> Limits:
        """fp32 differs by rounding only; int8 also rounds what goes into every product, with one
        scale for all tokens that are read together.

        measured: fp32 differed by up to 5e-5, KL 2e-12, agreement 100%; int8 by up to 3.9 (of
        tokens that are next to impossible), KL 6e-3 or 2e-3 of the information, 94%.
        """
        if self.int8:
            return Limits(logprob=8.0, kl=3e-2, share=2e-2, cached=8.0, agreement=0.85)
        return Limits(logprob=1e-3, kl=1e-6, share=1e-6, cached=1e-3, agreement=0.995)

    def refusal(self, source: Source) -> str | None:
        """What is traced is the cache of plain attention."""
        from .onnx_program import cache_shapes

        if cache_shapes(source.model) is None:
            return f"a {source.family!r} model keeps no plain key-value cache; take --to hf"
        return None

    def write(self, source: Source, folder: Path) -> Sequence[str]:
        """Trace it, quantise it if asked to, and put its tokenizer and settings beside it."""
        from .onnx_int8 import quantise
        from .onnx_program import write_program

        write_program(source.model, source.vocabulary, folder / FILE)
        if self.int8:
            quantise(folder / FILE)
        source.model.config.save_pretrained(folder)
        if source.model.generation_config is not None:
            source.model.generation_config.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        return ()

    def open(self, source: Source, folder: Path) -> Runtime:
        """With onnxruntime, on the CPU."""
        from .onnx_runtime import OnnxRuntime

        return OnnxRuntime.load(folder / FILE)
