"""Traces a PyTorch model to an ONNX file with `torch.onnx.export`, and runs it with onnxruntime.

`optimum` is not used: its release with ONNX export needs an older transformers than this project.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ...evaluation.speed import cache_name
from ...libraries import asking
from ..contract import Runtime, titled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

LARGEST_FILE = 3 << 29
"""Most bytes of weights inside the file. protobuf allows 2 GiB, so larger weights get a file of
their own."""

CacheShape = tuple[int, int, int]
"""Number of key-value heads, size of a key, size of a value."""


class _WithPlainCache(nn.Module):
    """The model with the cache as a list of tensors, in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache = cache_name(model) or ""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        # this cache keeps all of the past, also in layers with a sliding window, whose mask then
        # hides what lies outside the window
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache: cache},
        )
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (output.logits, *present)


@torch.no_grad()
def cache_shapes(model: Any) -> list[CacheShape] | None:
    """Shape of each layer's cache; None if the cache is not keys and values for each layer."""
    name = cache_name(model)
    if name is None:
        return None
    try:
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
        cache = getattr(output, name)
        shapes = [
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for layer in cache.layers
        ]
    except Exception:  # models with other inputs raise any class
        return None
    plain = all(layer.keys.shape[2] == 2 for layer in cache.layers)
    return shapes if plain and type(cache) is DynamicCache and shapes else None


def write_program(model: Any, path: Path, name: str) -> None:
    """Trace the model for any batch size, length and past, and write the graph.

    The example has two rows of five tokens after a past of three. Tracing would take an axis of
    size 0 or 1 for a constant.

    name  name of the student, for messages

    Raises
        ColdstillError: the exporter cannot trace it
    """
    shapes = cache_shapes(model)
    assert shapes is not None  # checked by `Onnx.refusal`
    past = [torch.zeros(2, heads, 3, size) for heads, key, value in shapes for size in (key, value)]
    example = (
        torch.arange(10).reshape(2, 5) % model.get_input_embeddings().num_embeddings,
        torch.ones(2, 8, dtype=torch.long),
        torch.arange(3, 8).repeat(2, 1),
        past,
    )
    batch, length, before = (torch.export.Dim(n) for n in ("batch", "sequence", "past"))
    rest = torch.export.Dim.DYNAMIC  # the sum of the last two
    pasts = [{0: batch, 2: before} for _ in past]
    names = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    where = f"students.{name}"
    action = f"trace a {model.config.model_type!r} model"
    # about missing optional packages and deprecations
    with only_errors("torch.onnx"), asking("torch.onnx", action, where=where, remedy="use --to hf"):
        program = torch.onnx.export(
            _WithPlainCache(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids"]
            + [f"past_key_values.{name}" for name in names],
            output_names=["logits"] + [f"present.{name}" for name in names],
            dynamic_shapes=(
                {0: batch, 1: length},
                {0: batch, 1: rest},
                {0: batch, 1: length},
                pasts,
            ),
        )
    assert program is not None
    _remove_source_lines(program.model)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    program.save(str(path), external_data=size > LARGEST_FILE)


def _remove_source_lines(model: Any) -> None:
    """Remove the source lines that every node was traced from.

    They hold paths of this machine, and are most of a small model's file.
    """
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def only_errors(name: str | None = None) -> Iterator[None]:
    """Suppress warnings, also those of a logger (the root logger without a name)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, eq=False)
class OnnxRuntime(Runtime):
    """A session on the CPU, with as many threads as torch has."""

    session: Any
    title: str
    is_own: bool = True

    @classmethod
    def load(cls, path: Path) -> OnnxRuntime:
        """Open a file.

        Raises
            ColdstillError: onnxruntime cannot load it
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        with asking("onnxruntime", "load it", where=str(path), remedy="use --to hf"):
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return cls(session, titled("onnxruntime"))

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, and the cache by the names of the graph's inputs.

        last  has no effect: the graph computes the logits of all positions
        """
        past = self.empty_cache() if cache is None else cache
        before = next(iter(past.values())).shape[2]
        count = len(tokens_T)
        inputs = {
            "input_ids": tokens_T.astype(np.int64)[None],
            "attention_mask": np.ones((1, before + count), np.int64),
            "position_ids": np.arange(before, before + count, dtype=np.int64)[None],
        }
        names = [output.name for output in self.session.get_outputs()]
        with asking("onnxruntime", "run it", where="model.onnx", remedy="use --to hf"):
            found = self.session.run(None, inputs | past)
        outputs = dict(zip(names, found, strict=True))
        logits: NDArray[Any] = outputs.pop("logits")[0]
        return logits, {
            name.replace("present", "past_key_values"): value for name, value in outputs.items()
        }

    def empty_cache(self, batch: int = 1) -> dict[str, NDArray[Any]]:
        """Keys and values of length 0 for every layer."""
        return {
            each.name: np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32)
            for each in self.session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
