"""A folder for transformers: safetensors, tokenizer and generation settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .contract import Format, Limits, titled, transformers_usage

if TYPE_CHECKING:
    from pathlib import Path

    from .contract import LoadedStudent, Runtime


class HuggingFace(Format):
    """The unchanged student, for `AutoModelForCausalLM` and everything that reads its files.

    measured: no difference in any family.
    """

    limits = Limits(logprob=1e-5, kl=1e-9, share=1e-9, cached=1e-3, agreement=0.999)
    library: ClassVar[str] = "transformers"
    weights: ClassVar[str] = "*.safetensors"

    def usage(self, name: str) -> str:
        return transformers_usage()

    def write(
        self, student: LoadedStudent, folder: Path, base: Path | None = None
    ) -> tuple[str, ...]:
        """Write the weights in the student's own precision, with the tokens that end generation."""
        from ..models.loading import load_model
        from .reference import ready_to_export

        where, own_code = f"students.{student.name}", student.own_code
        model = load_model(str(student.folder), where, precision="auto", own_code=own_code)
        model = ready_to_export(model, student.vocabulary, student.ends)
        settings, tokenizer = model.generation_config, student.tokenizer
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.bos_token_id is None:
            settings.bos_token_id = tokenizer.bos_token_id
        if settings.pad_token_id is None:
            # without one, generation warns on each call that it takes the end of text
            ends = settings.eos_token_id
            end = ends[0] if isinstance(ends, list) else ends
            own = tokenizer.pad_token_id
            settings.pad_token_id = end if own is None else own
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return ()

    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        """Load it in fp32."""
        from ..models.loading import load_model
        from .torch_runtime import TorchRuntime

        where, own_code = f"export {student.name}", student.own_code
        model = load_model(str(folder), where, precision="fp32", own_code=own_code)
        return TorchRuntime(model, titled("transformers"))
