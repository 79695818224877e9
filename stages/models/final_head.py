"""A teacher's final norm and output head alone, applied to stored hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError
from ..report import Reporter, silent
from .device import best_device
from .loading import load_head
from .output_head import connect_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm")
"""Names of the final norm in the models of transformers."""


class FinalHead:
    """Logits of hidden states. The weights are loaded at the first call."""

    def __init__(
        self, teacher: str, where: str, vocabulary: int, report: Reporter = silent
    ) -> None:
        """Name the teacher.

        teacher     folder of the model
        where       what named it, for messages
        vocabulary  V, the real vocabulary
        """
        self._teacher, self._where = teacher, where
        self._vocabulary, self._report = vocabulary, report
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def __call__(self, states_MH: NDArray[Any], before_norm: bool) -> NDArray[Any]:
        """[M, V] fp32 logits.

        states_MH    [M, H] float32
        before_norm  whether the final norm is applied first

        Raises
            ColdstillError: the model cannot be loaded, has no final norm of a known name, or states
                of another size
        """
        if self._loaded is None:
            self._loaded = self._load()
        head, norm = self._loaded
        hidden = torch.from_numpy(states_MH).to(head.device)
        if hidden.shape[1] != head.width:
            raise ColdstillError(
                f"{self._where}: the states have {hidden.shape[1]} numbers, the head of "
                f"{self._teacher} takes {head.width}; name the model that they are of"
            )
        if before_norm:
            hidden = norm(hidden)
        buffer = head.buffer(len(hidden), head.device)
        parts = [
            head.logits(hidden[start : start + len(buffer)], buffer).float().cpu().clone()
            for start in range(0, len(hidden), max(1, len(buffer)))
        ]
        logits: NDArray[Any] = torch.cat(parts).numpy() if parts else states_MH[:, :0]
        return logits

    def _load(self) -> tuple[Any, Any]:
        model = load_head(self._teacher, self._where, precision="fp32").to(best_device())
        base = model.base_model
        norm = next((getattr(base, name) for name in _NORMS if hasattr(base, name)), None)
        head = connect_head(model, self._vocabulary, self._report)
        if norm is None or head.whole:
            raise ColdstillError(
                f"{self._where}: the final norm and head of {self._teacher} cannot be applied "
                "alone; choose a model whose head is a matrix"
            )
        return head, norm
