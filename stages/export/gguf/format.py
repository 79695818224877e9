"""GGUF for llama.cpp: one file with weights, settings and tokenizer, in f16, q8_0 or q4_0."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..contract import Format, Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..contract import LoadedStudent, Runtime

READER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text")
"""Those of `ARCHITECTURES` that transformers can read, for machines without llama.cpp."""


_Q8_LIMITS = Limits(logprob=10.0, kl=8e-2, share=1e-2, cached=8.0, agreement=0.8)


@dataclass(frozen=True)
class Gguf(Format):
    """A GGUF file. Its own runtime is llama.cpp (`coldstill[llama]`, which compiles).

    Without llama.cpp transformers reads the file for the check, and the record states this.
    """

    precision: Literal["f16", "q8_0", "q4_0"]
    """Precision of matrices. Vectors and position embeddings stay in f32. With q4_0 the output
    head, and an embedding that is the same matrix, have q8_0."""
    library: ClassVar[str] = "gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "gguf"
    weights: ClassVar[str] = "*.gguf"

    @property
    def base(self) -> str | None:
        return None if self.precision == "f16" else "gguf-f16"

    @property
    def missing_runtime(self) -> str | None:
        return None if has_llama_cpp() else "llama"

    @property
    def limits(self) -> Limits:
        """llama.cpp rounds activations to the precision of the weights, and its cache to f16.

        measured, of random students, SmolLM2-135M and a student just cut from it: f16 differed by
        up to 0.11 (with its cache 0.08), KL 1.3e-5 or 1.7e-6 of the information, agreement 99.6% (a
        doubled rotary base: 8e-5 of the information and more); q8_0 by up to 3.3 (1.6), 1.7e-2 or
        2.1e-3, 92%; q4_0 by up to 24 (1.4), 0.90 or 0.12, 49%.
        """
        if self.precision == "f16":
            return Limits(logprob=0.5, kl=1e-4, share=1e-5, cached=0.5, agreement=0.98)
        if self.precision == "q4_0":
            return Limits(logprob=80.0, kl=3.0, share=0.3, cached=8.0, agreement=0.25)
        return _Q8_LIMITS

    @property
    def limits_on_grid(self) -> Limits:
        """Those of q8_0, to which llama.cpp rounds activations."""
        return self.limits if self.precision == "f16" else _Q8_LIMITS

    def usage(self, name: str) -> str:
        file = _file(name, self.precision)
        return (
            f'```bash\nllama-cli -m {file} -p "Once" -n 50\n```\n\n'
            "or, with `pip install llama-cpp-python`:\n\n```python\n"
            f'from llama_cpp import Llama\n\nmodel = Llama("{file}", n_ctx=0, verbose=False)\n'
            'print("Once" + model("Once", max_tokens=50)["choices"][0]["text"])\n```\n'
        )

    def context(self, student: LoadedStudent) -> int | None:
        """The sliding window, if llama.cpp does not support windows for the family."""
        from .architectures import ARCHITECTURES

        settings = ARCHITECTURES[student.family].settings(student.model.config)
        length: int = settings["context_length"]
        return length

    def refusal(self, student: LoadedStudent) -> str | None:
        """llama.cpp supports some families, with few of their settings, and some tokenizers."""
        from .architectures import refusal
        from .writer import tokens_refusal

        reason = refusal(student.model) or tokens_refusal(student.tokenizer)
        if reason is None and not has_llama_cpp() and student.family not in READER_FAMILIES:
            return (
                f"the check of a {student.family!r} file needs llama.cpp: pip install "
                "'coldstill[llama]'"
            )
        return reason

    def write(
        self, student: LoadedStudent, folder: Path, base: Path | None = None
    ) -> Sequence[str]:
        """Write it from the student's own weights: those of the base are rounded to f16, which
        would change the scales of weights that were trained on a grid."""
        from .writer import write_gguf

        return write_gguf(student, folder / _file(student.name, self.precision), self.precision)

    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        (path,) = folder.glob(self.weights)
        if has_llama_cpp():
            from .runtimes import LlamaCpp

            return LlamaCpp.load(path, student)
        from .runtimes import read_back

        return read_back(path, student)


def _file(name: str, precision: str) -> str:
    return f"{name}-{precision}.gguf"


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None
