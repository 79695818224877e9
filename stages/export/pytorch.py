"""Folders that transformers loads: the unchanged student, and int8 weights with torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..libraries import asking
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
        from ..models.loading import load_model, usual_tokenizer
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
        usual = usual_tokenizer(str(folder), where)
        if all(usual(text).input_ids == tokenizer(text).input_ids for text in student.texts):
            return ()
        return (
            f"AutoTokenizer splits text by the rule of {student.family!r} models, into other "
            "tokens; load the tokenizer with PreTrainedTokenizerFast",
        )

    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        from .reference import TorchRuntime

        return TorchRuntime(_load(folder, student), titled("transformers"))


class TorchAo(Format):
    """int8 weights of every linear layer, with one scale for each row: the row's largest magnitude
    over 127. Activations stay in fp32.

    The output head is quantised too, and so is the embedding unless the two are tied.

    measured: differences of up to 1.5, KL 5.5e-3 (a student just cut from SmolLM2-135M) or 7e-4 of
    the information, agreement 96%.
    """

    base = "hf"
    limits = Limits(logprob=6.0, kl=3e-2, share=5e-3, cached=1e-2, agreement=0.92)
    library: ClassVar[str] = "transformers"
    packages: ClassVar[tuple[str, ...]] = ("torchao",)
    extra: ClassVar[str] = "torchao"
    weights: ClassVar[str] = "*.safetensors"

    def usage(self, name: str) -> str:
        return transformers_usage("transformers torchao")

    def refusal(self, student: LoadedStudent) -> str | None:
        """torchao quantises only `nn.Linear`, and leaves a model without it unchanged."""
        import torch

        head = student.model.get_output_embeddings()
        modules = student.model.modules()
        if any(isinstance(module, torch.nn.Linear) and module is not head for module in modules):
            return None
        return (
            f"a {student.family!r} model has no linear layers that torchao can quantise; use --to "
            "hf, or --to onnx-int8 or --to gguf-q8_0 if they support the family"
        )

    def write(
        self, student: LoadedStudent, folder: Path, base: Path | None = None
    ) -> tuple[str, ...]:
        """Quantise while loading, as transformers does it, and save."""
        assert base is not None
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        tied = bool(student.model.config.get_text_config().tie_word_embeddings)
        settings = TorchAoConfig(
            Int8WeightOnlyConfig(version=2), include_input_output_embeddings=not tied
        )
        action = f"quantise a {student.family!r} model"
        where = f"students.{student.name}"
        with asking("torchao", action, where=where, remedy="use --to hf or --to onnx-int8"):
            model = _load(base, student, options={"quantization_config": settings})
            _scale_to_127(model, student)
            model.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        return ()

    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        """Load it with transformers, which reads in `config.json` that torchao is needed."""
        from .reference import TorchRuntime

        return TorchRuntime(_load(folder, student), titled("torchao"))


def _scale_to_127(model: Any, student: LoadedStudent) -> None:
    """Give every quantised row the scale of the grid `row`: its largest magnitude over 127.

    torchao divides by 127.5, which cuts the largest positive weight of each row by half a level,
    again each time that the result is quantised.
    """
    from torchao.quantization import Int8Tensor

    from ..models.grids import ROW

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Int8Tensor):
            levels, scale = ROW.levels(student.model.get_submodule(name).weight.detach())
            weight.qdata.copy_(levels.flatten(-2))
            weight.scale.copy_(scale.flatten(-2))


def _load(folder: Path, student: LoadedStudent, **options: Any) -> Any:
    """An export's model in fp32."""
    from ..models.loading import load_model

    where = f"export {student.name}"
    return load_model(str(folder), where, precision="fp32", own_code=student.own_code, **options)
