"""GGUF for llama.cpp: one file with weights, settings and tokenizer, in f16 or q8_0."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .contract import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .contract import Runtime, Source

READER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text")
"""Those of `gguf_families` that transformers can read back, where llama.cpp is not installed."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """llama.cpp's file. Its own runtime is llama.cpp (`coldstill[llama]`, which compiles); without
    that the check reads the file back through transformers, and says so."""

    precision: Literal["f16", "q8_0"]
    """Of the matrices; vectors and positions stay in f32."""
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "gguf"
    weights: ClassVar[str] = "*.gguf"

    @property
    def limits(self) -> Limits:
        """llama.cpp rounds activations to the precision of the weights before each product, and
        keeps its cache in f16.

        measured: f16 differed by up to 0.11, KL 2e-6 or 1e-6 of the information, agreement 99.7%;
        q8_0 by up to 0.75, 8e-4 or 1e-3, 95%.
        """
        if self.precision == "f16":
            return Limits(logprob=1.0, kl=1e-4, share=1e-4, cached=0.5, agreement=0.97)
        return Limits(logprob=4.0, kl=1e-2, share=1e-2, cached=4.0, agreement=0.9)

    def refusal(self, source: Source) -> str | None:
        """llama.cpp has a program of its own for each family, with few choices in it."""
        from .gguf_families import refusal
        from .gguf_tokens import refusal as tokens_refusal

        reason = refusal(source.model) or tokens_refusal(source.tokenizer)
        if reason is None and not has_llama_cpp() and source.family not in READER_FAMILIES:
            reason = (
                f"only llama.cpp can read a {source.family!r} file back, which is how it is "
                "checked: pip install 'coldstill[llama]'"
            )
        return reason

    def write(self, source: Source, folder: Path) -> Sequence[str]:
        """Write the file."""
        from .gguf_writer import write_gguf

        return write_gguf(source, self.precision, folder / f"{source.name}-{self.precision}.gguf")

    def open(self, source: Source, folder: Path) -> Runtime:
        """With llama.cpp if it is here, else through transformers."""
        (path,) = folder.glob(self.weights)
        if has_llama_cpp():
            from .llama_cpp_runtime import LlamaCpp

            return LlamaCpp.load(path, source)
        from .gguf_reader import read_back

        return read_back(path, source)


def has_llama_cpp() -> bool:
    """Whether the package is here."""
    return importlib.util.find_spec("llama_cpp") is not None
