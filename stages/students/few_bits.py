"""Students of few bits: training with rounded weights (quantisation-aware training).

The modules are those of `torchao`: a linear layer or an embedding that rounds its weights in every
forward pass and passes the gradient on to the exact weights. Rounding is that of the runtimes which
the student is made for (`grids.py`), since torchao's own rounding has other scales. The exact
weights are what is trained and saved in checkpoints. They are put on the grid after the last step,
and the modules become plain ones again. So the trained model is an ordinary checkpoint.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
from torchao.quantization.qat.fake_quantize_config import FakeQuantizeConfigBase
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
from torchao.quantization.qat.linear import FakeQuantizedLinear
from transformers import TrainerCallback

from ...data.errors import ColdstillError
from ..models.grids import SCHEMES, Grid
from ..training.steps import step_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..config import QuantizeConfig

_INSTEAD = "remove quantize, and quantise it afterwards with coldstill export"


@dataclass(frozen=True)
class _GridConfig(FakeQuantizeConfigBase):  # type: ignore[misc]  # torchao is untyped
    """The grid of a `GridRounding`, in the form that torchao expects."""

    grid: Grid


class GridRounding(FakeQuantizerBase):  # type: ignore[misc]  # torchao is untyped
    """Rounds a tensor to a grid while `enabled`; the gradient passes as if it did not."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.config = _GridConfig(grid)
        self.enabled = False

    def forward(self, exact: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return exact
        apply: Any = _StraightThrough.apply  # torch leaves it untyped
        rounded: torch.Tensor = apply(exact, self.config.grid)
        return rounded


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, grid: Grid) -> torch.Tensor:
        return grid.rounded(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Rounding(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A model whose layers round their weights from a step on."""

    def __init__(self, model: Any, config: QuantizeConfig, steps: int) -> None:
        self._model, self._config = model, config
        self.first = step_count(config.start, steps)
        """First step with rounding, counted from 0. A function of the recipe alone, so that a
        resumed training rounds the same steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for module in self._model.modules():
            if isinstance(module, GridRounding):
                module.enabled = state.global_step >= self.first

    def finish(self) -> dict[str, Any]:
        """Put the weights on their grids, make the layers plain ones, and return the record."""
        grids: dict[str, Grid] = {}
        for name, module in _rounding(self._model):
            grids[f"{name}.weight"] = grid = module.weight_fake_quantizer.config.grid
            with torch.no_grad():  # a tied matrix is rounded twice, which changes nothing
                module.weight.copy_(grid.rounded(module.weight))
        plain = QATConfig(step="convert")
        quantize_(self._model, plain, filter_fn=lambda module, _: isinstance(module, _MODULES))
        return self._record(grids)

    def note(self) -> str:
        """What is rounded, for the user, as a sentence."""
        grids: dict[int, Grid] = {}  # a tied matrix counts once
        for _, module in _rounding(self._model):
            grids[module.weight.data_ptr()] = module.weight_fake_quantizer.config.grid
        kinds = Counter(f"{grid.bits} bits ({grid.name})" for grid in grids.values())
        parts = [f"{count} in {kind}" for kind, count in kinds.items()]
        exact = self._exact({f"{name}.weight" for name, _ in _rounding(self._model)})
        rest = f"; not rounded: {', '.join(exact)}" if exact else ""
        return f"rounds matrices, {' and '.join(parts)}, from step {self.first + 1} on{rest}"

    def _exact(self, rounded: set[str]) -> list[str]:
        """Names of the matrices that are not rounded. Vectors never are."""
        weights = dict(self._model.named_parameters(remove_duplicate=False))
        places = {weights[name].data_ptr() for name in rounded}
        return [
            name
            for name, weight in self._model.named_parameters()
            if weight.ndim > 1 and weight.data_ptr() not in places
        ]

    def _record(self, grids: dict[str, Grid]) -> dict[str, Any]:
        scheme = SCHEMES[self._config.scheme]
        weights = dict(self._model.named_parameters(remove_duplicate=False))
        exact = self._exact(set(grids))
        # a tied matrix has two names and counts once
        single = {weights[name].data_ptr(): (weights[name], grid) for name, grid in grids.items()}
        return {
            "scheme": self._config.scheme,
            "first_step": self.first,
            "grids": [
                {
                    "name": grid.name,
                    "bits": grid.bits,
                    "block": grid.block,
                    "tensors": [name for name, own in grids.items() if own == grid],
                    "parameters": sum(w.numel() for w, own in single.values() if own == grid),
                }
                for grid in dict.fromkeys(grids.values())
            ],
            "activations": None if scheme.activations is None else scheme.activations.name,
            "exact": {
                "tensors": exact,
                "parameters": sum(w.numel() for w in self._model.parameters())
                - sum(w.numel() for w, _ in single.values()),
            },
            "formats": list(scheme.formats),
            "torchao": version("torchao"),
        }


_MODULES = (FakeQuantizedLinear, FakeQuantizedEmbedding)


def _rounding(model: Any) -> Iterator[tuple[str, Any]]:
    """Layers that round, with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, _MODULES):
            yield name, module


def round_layers(model: Any, config: QuantizeConfig, steps: int, where: str) -> Rounding:
    """Replace the linear layers of a model, and its embedding, by layers that round. Rounding is
    off until the callback that is returned turns it on.

    Weights keep their names and places, so that checkpoints and tied matrices stay as they are. The
    output head is among the layers: the loss reads the rounded matrix (`OutputHead.weight`).

    steps  steps of the training
    where  the recipe's table, for messages

    Raises
        ColdstillError: the model has no linear layers, the format cannot hold the width of a layer,
            or torchao would change what a layer computes; the model is unchanged
    """
    scheme, kind = SCHEMES[config.scheme], model.config.model_type
    where = f"{where}.quantize"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    of_head = scheme.head if scheme.tied_head or not tied else None
    chosen: dict[str, tuple[Any, Grid]] = {}
    for name, module in model.named_modules():
        is_matrix = isinstance(module, torch.nn.Linear) or module is embedding
        is_head = module is head or (tied and module is embedding)
        grid = of_head if is_head else scheme.layers
        if is_matrix and grid is not None:
            chosen[name] = module, grid
    if not any(module not in (head, embedding) for module, _ in chosen.values()):
        raise ColdstillError(
            f"{where}: a {kind!r} model has no linear layers that torchao can train with rounding; "
            f"{_INSTEAD}"
        )
    for name, (module, grid) in chosen.items():
        # a subclass may compute more than its base class, for example scale its result
        if type(module) not in (torch.nn.Linear, torch.nn.Embedding):
            raise ColdstillError(
                f"{where}: torchao cannot train {name} of a {kind!r} model with rounding: it is a "
                f"{type(module).__name__}, neither Linear nor Embedding; {_INSTEAD}"
            )
        width = module.weight.shape[1]
        if grid.block is not None and width % grid.block:
            raise ColdstillError(
                f"{where}: {config.scheme} has one scale for every {grid.block} inputs of a layer, "
                f"and {name} has {width:,}; choose sizes that are multiples of {grid.block}, or "
                "quantize = 'int8-row'"
            )
    for name, (module, grid) in chosen.items():
        if isinstance(module, torch.nn.Embedding):
            layer: Any = FakeQuantizedEmbedding.from_embedding(module)
        else:
            layer = FakeQuantizedLinear.from_linear(module)
            if scheme.activations is not None:
                layer.activation_fake_quantizer = GridRounding(scheme.activations)
        layer.weight_fake_quantizer = GridRounding(grid)
        model.set_submodule(name, layer)
    return Rounding(model, config, steps)
