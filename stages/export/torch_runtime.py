"""A PyTorch model as a runtime: exports that transformers loads, and the student itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.generation_speed import cache_name, call_settings
from .contract import Runtime

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TorchRuntime(Runtime):
    """A causal language model of transformers, on the CPU."""

    model: Any
    title: str
    is_own: bool = True

    @torch.no_grad()
    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, or [1, V] with `last` if the model supports it, and the cache.

        The cache is None for a model without one. Recurrent models return their state.
        """
        ids = torch.from_numpy(tokens_T.astype("int64"))[None]
        name = cache_name(self.model)
        cached = {} if name is None else {"use_cache": True, name: cache}
        settings = call_settings(self.model)[0] if last else {}
        output = self.model(input_ids=ids, **cached, **settings)
        logits: NDArray[Any] = output.logits[0].float().numpy()
        return logits, None if name is None else getattr(output, name, None)
