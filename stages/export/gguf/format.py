"""GGUF for llama.cpp: one file with weights, settings and tokenizer, in f16 or q8_0."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..contract import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..contract import Runtime, Source

READER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text")
"""Those of `gguf_families` that transformers can read back, where llama.cpp is not installed."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """llama.cpp's file. Its own runtime is llama.cpp (`coldstill[llama]`, which compiles); without
    that the check reads the file back through transformers, and says so."""

    precision: Literal["f16", "q8_0"]
    """Of the matrices; vectors and positions stay in f32."""
    library: ClassVar[str] = "gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "gguf"
    weights: ClassVar[str] = "*.gguf"

    @property
    def base(self) -> str | None:
        """The file in f16."""
        return "gguf-f16" if self.precision == "q8_0" else None

    @property
    def lacking(self) -> str | None:
        """llama.cpp, which not everybody has."""
        return None if has_llama_cpp() else "llama"

    @property
    def limits(self) -> Limits:
        """llama.cpp rounds activations to the precision of the weights before each product, and
        keeps its cache in f16.

        measured: f16 differed by up to 0.11, KL 2e-6 or 1.2e-6 of the information, agreement 99.6%
        (a rotary base twice as large: 8e-5 of the information and more); q8_0 by up to 0.75, 8e-4
        or 1e-3, 94%.
        """
        if self.precision == "f16":
            return Limits(logprob=0.5, kl=1e-5, share=1e-5, cached=0.5, agreement=0.98)
        return Limits(logprob=3.0, kl=4e-3, share=4e-3, cached=3.0, agreement=0.9)

    def usage(self, name: str) -> str:
        """With llama.cpp's own program, or through Python."""
        file = _file(name, self.precision)
        return (
            f'```bash\nllama-cli -m {file} -p "Once" -n 50\n```\n\n'
            "or, with `pip install llama-cpp-python`:\n\n```python\n"
            f'from llama_cpp import Llama\n\nmodel = Llama("{file}", n_ctx=0, verbose=False)\n'
            'print("Once" + model("Once", max_tokens=50)["choices"][0]["text"])\n```\n'
        )

    def context(self, source: Source) -> int | None:
        """A sliding window, where llama.cpp has none for the family."""
        from .families import family_of

        length: int = family_of(source.model).facts(source.model.config)["context_length"]
        return length

    def refusal(self, source: Source) -> str | None:
        """llama.cpp has a program of its own for each family, with few choices in it."""
        from .families import refusal
        from .tokens import refusal as tokens_refusal

        reason = refusal(source.model) or tokens_refusal(source.tokenizer)
        if reason is None and not has_llama_cpp() and source.family not in READER_FAMILIES:
            reason = (
                f"only llama.cpp can read a {source.family!r} file back, which is how it is "
                "checked: pip install 'coldstill[llama]'"
            )
        return reason

    def write(self, source: Source, folder: Path, base: Path | None = None) -> Sequence[str]:
        """Write the file in f16, or that of another precision from it."""
        path = folder / _file(source.name, self.precision)
        if self.precision == "q8_0":
            from .q8 import quantise

            assert base is not None
            return quantise(base / _file(source.name, "f16"), path)
        from .writer import write_gguf

        return write_gguf(source, path)

    def open(self, source: Source, folder: Path) -> Runtime:
        """With llama.cpp if it is here, else through transformers."""
        (path,) = folder.glob(self.weights)
        if has_llama_cpp():
            from .llama_cpp_runtime import LlamaCpp

            return LlamaCpp.load(path, source)
        from .reader import read_back

        return read_back(path, source)


def _file(name: str, precision: str) -> str:
    return f"{name}-{precision}.gguf"


def has_llama_cpp() -> bool:
    """Whether the package is here."""
    return importlib.util.find_spec("llama_cpp") is not None
