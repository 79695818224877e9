"""An ONNX file under onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...libraries import asking
from ..contract import titled

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class OnnxRuntime:
    """A session on the CPU, with as many threads as torch has."""

    session: Any
    title: str
    is_own: bool = True
    elsewhere: None = None

    @classmethod
    def load(cls, path: Path) -> OnnxRuntime:
        """Open a file.

        Raises
            ColdstillError: onnxruntime does not take it
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        with asking("onnxruntime", "load it", where=str(path), remedy="take --to hf"):
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return cls(session, titled("onnxruntime"))

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, and the cache: keys and values by the names of the inputs.

        last  of no account: the graph computes the logits of every place that it is given
        """
        past = self._nothing() if cache is None else cache
        before = next(iter(past.values())).shape[2]
        count = len(tokens_T)
        inputs = {
            "input_ids": tokens_T.astype(np.int64)[None],
            "attention_mask": np.ones((1, before + count), np.int64),
            "position_ids": np.arange(before, before + count, dtype=np.int64)[None],
        }
        names = [output.name for output in self.session.get_outputs()]
        with asking("onnxruntime", "run it", where="model.onnx", remedy="take --to hf"):
            found = self.session.run(None, inputs | past)
        outputs = dict(zip(names, found, strict=True))
        logits: NDArray[Any] = outputs.pop("logits")[0]
        return logits, {
            name.replace("present", "past_key_values"): value for name, value in outputs.items()
        }

    def close(self) -> None:
        """Nothing: memory goes with the last that holds it."""

    def _nothing(self) -> dict[str, NDArray[Any]]:
        return {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
            for each in self.session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
