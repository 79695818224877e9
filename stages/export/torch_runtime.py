"""A PyTorch model as a runtime: exports that transformers loads, and the student itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TorchRuntime:
    """A causal language model of transformers, on the CPU."""

    model: Any
    title: str
    is_own: bool = True
    elsewhere: None = None

    @torch.no_grad()
    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, or [1, V] where `last` and the model can, and the cache: None of a
        model that keeps none, or one of its own kind (a recurrent one's state)."""
        ids = torch.from_numpy(tokens_T.astype("int64"))[None]
        name = cache_name(self.model)
        cached = {} if name is None else {"use_cache": True, name: cache}
        settings = {"logits_to_keep": 1} if last and self._keeps_some else {}
        output = self.model(input_ids=ids, **cached, **settings)
        logits: NDArray[Any] = output.logits[0].float().numpy()
        return logits, None if name is None else getattr(output, name, None)

    @property
    def _keeps_some(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def close(self) -> None:
        """Nothing: memory goes with the last that holds it."""


def cache_name(model: Any) -> str | None:
    """What a model calls the cache, in and out: transformers is renaming it. None where it has no
    cache of keys and values."""
    named = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in named), None)
