"""int8 weights in PyTorch, through torchao: a folder that transformers loads where torchao is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..libraries import asking
from .contract import Limits, titled, transformers_usage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .contract import Runtime, Source


@dataclass(frozen=True, slots=True)
class TorchAo:
    """Every linear layer's weights in int8 with a scale for each row; activations stay in fp32.

    The head is among them, and the embedding too, unless they are one and the same matrix.

    measured: differences of up to 0.76, KL 5e-4 or 4e-4 of the information, agreement 96%.
    """

    limits: ClassVar[Limits] = Limits(logprob=3.0, kl=2e-3, share=2e-3, cached=1e-2, agreement=0.92)
    base: ClassVar[str] = "hf"
    lacking: ClassVar[None] = None
    library: ClassVar[str] = "transformers"
    packages: ClassVar[tuple[str, ...]] = ("torchao",)
    extra: ClassVar[str] = "torchao"
    weights: ClassVar[str] = "*.safetensors"

    def usage(self, name: str) -> str:
        """With transformers, where torchao is."""
        return transformers_usage("transformers torchao")

    def context(self, source: Source) -> int | None:
        """As the student."""
        return None

    def refusal(self, source: Source) -> str | None:
        """torchao quantises `nn.Linear`: a model that is made of others would be left as it is."""
        import torch

        head = source.model.get_output_embeddings()
        linear = [
            module
            for module in source.model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        ]
        if not linear:
            return (
                f"a {source.family!r} model has no linear layers that torchao knows; take --to hf, "
                "or where it is known there --to onnx-int8 or --to gguf-q8_0"
            )
        return None

    def write(self, source: Source, folder: Path, base: Path | None = None) -> Sequence[str]:
        """Quantise while loading, as transformers does it, and save."""
        assert base is not None
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings = TorchAoConfig(
            Int8WeightOnlyConfig(version=2), include_input_output_embeddings=not _is_tied(source)
        )
        action = f"quantise a {source.family!r} model"
        where = f"students.{source.name}"
        with asking("torchao", action, where=where, remedy="take --to hf or --to onnx-int8"):
            model = _load(base, source, {"quantization_config": settings})
            model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        return ()

    def open(self, source: Source, folder: Path) -> Runtime:
        """Through `AutoModelForCausalLM`, which finds in `config.json` that torchao is needed."""
        from .torch_runtime import TorchRuntime

        return TorchRuntime(_load(folder, source, {}), titled("torchao"))


def _is_tied(source: Source) -> bool:
    return bool(source.model.config.get_text_config().tie_word_embeddings)


def _load(folder: Path, source: Source, options: dict[str, Any]) -> Any:
    from ..models.loading import load_model

    return load_model(
        str(folder),
        f"export {source.name}",
        precision="fp32",
        own_code=source.own_code,
        options=options,
    )
