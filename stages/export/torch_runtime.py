"""A PyTorch model as a runtime: exports that transformers loads, and the student itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

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
        can_skip = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        settings = {"logits_to_keep": 1} if last and can_skip else {}
        output = self.model(input_ids=ids, **cached, **settings)
        logits: NDArray[Any] = output.logits[0].float().numpy()
        return logits, None if name is None else getattr(output, name, None)


def cache_name(model: Any) -> str | None:
    """Name of the key-value cache among the inputs and outputs of a model; None without one.

    transformers renames it from `past_key_values` to `cache`.
    """
    named = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in named), None)
