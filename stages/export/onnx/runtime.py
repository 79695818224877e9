"""Runs an ONNX file with onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...libraries import asking
from ..contract import Runtime, titled

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


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
