"""A folder for transformers: safetensors, tokenizer, generation settings and a model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .contract import Limits, titled, transformers_usage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .contract import Runtime, Source


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """The student as it is, for `AutoModelForCausalLM` and all that reads the same files.

    measured: no difference at all, in any family.
    """

    limits: ClassVar[Limits] = Limits(
        logprob=1e-5, kl=1e-9, share=1e-9, cached=1e-3, agreement=0.999
    )
    base: ClassVar[None] = None
    lacking: ClassVar[None] = None
    library: ClassVar[str] = "transformers"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    weights: ClassVar[str] = "*.safetensors"

    def usage(self, name: str) -> str:
        """With transformers."""
        return transformers_usage()

    def context(self, source: Source) -> int | None:
        """As the student."""
        return None

    def refusal(self, source: Source) -> str | None:
        """Every student was made by transformers."""
        return None

    def write(self, source: Source, folder: Path, base: Path | None = None) -> Sequence[str]:
        """Weights in the student's own precision, and what generation needs to know to end."""
        from ..models.ends import stop_at
        from ..models.generation import repair_generation
        from ..models.loading import load_model
        from ..models.vocabulary import without_padding

        where, own_code = f"students.{source.name}", source.own_code
        model = load_model(str(source.folder), where, precision="auto", own_code=own_code)
        model = without_padding(model, source.vocabulary)
        repair_generation(model)
        stop_at(model, source.ends.tokens)
        settings, tokenizer = model.generation_config, source.tokenizer
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.bos_token_id is None:
            settings.bos_token_id = tokenizer.bos_token_id
        if settings.pad_token_id is None:
            # generation asks for one, and warns each time that it takes the end of text instead
            ends = settings.eos_token_id
            end = ends[0] if isinstance(ends, list) else ends
            settings.pad_token_id = (
                end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return ()

    def open(self, source: Source, folder: Path) -> Runtime:
        """Through `AutoModelForCausalLM`, in fp32."""
        from ..models.loading import load_model
        from .torch_runtime import TorchRuntime

        where, own_code = f"export {source.name}", source.own_code
        model = load_model(str(folder), where, precision="fp32", own_code=own_code)
        return TorchRuntime(model, titled("transformers"))
