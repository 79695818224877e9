"""From hidden states to logits as the model itself does it, for any number of positions at a time.

Full logits `[B, T, V]` are most of the memory of a small model, so nobody here makes them: the
transformer runs without its head, and the head is applied to a few hundred positions at a time.
Some models do more after the head (soft-capping, scaling); `connect_head` tries what it knows
against the model's own logits and, if none agrees, falls back to calling the whole model.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ...data.errors import ColdstillError
from ..libraries import asking
from ..report import Report, Reporter, silent
from .chunk_size import CHUNK_ELEMENTS, chunk_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_ANOTHER = "choose another model"
_DEVICE_SHARE = 128
"""On an accelerator a chunk may take one part in so many of its memory: it needs more rows at a
time to be busy, and has more memory."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """A model split at its output head. Its logits cover the real vocabulary only."""

    model: Any
    vocabulary: int
    """V; rows of the head past it are padding and never computed."""
    scale: float = 1.0
    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)`."""
    whole: bool = False
    """The fallback: `hidden` gives finished logits and `logits` hands them through."""

    @property
    def weight(self) -> torch.Tensor | None:
        """[>= V, D] the output embedding, or None in the fallback."""
        return None if self.whole else self.model.get_output_embeddings().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[>= V] its bias, if it has one."""
        return None if self.whole else getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def device(self) -> torch.device:
        """Where the head is; a model that is spread out has its parts in several places."""
        weight = self.weight
        return _real(self.model.device if weight is None else weight.device)

    @property
    def input_device(self) -> torch.device:
        """Where token ids go."""
        return _real(self.model.get_input_embeddings().weight.device)

    @property
    def chunk(self) -> int:
        """How many positions to take at a time."""
        return chunk_rows(self.vocabulary, max(CHUNK_ELEMENTS, _accelerator_share()))

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """[B, T, D] what the head would be applied to (in the fallback: [B, T, V] logits).

        With `lengths` `[B]` among the inputs each row is asked alone, without its padding.
        """
        if "lengths" in inputs:
            return self._one_by_one(inputs["input_ids"], inputs["lengths"].tolist())
        if self.whole:
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
            return logits[..., : self.vocabulary]
        states: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def _one_by_one(self, ids_BT: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        width = ids_BT.shape[1]
        rows = [
            functional.pad(
                self.hidden({"input_ids": ids_BT[row : row + 1, :length]})[0],
                (0, 0, 0, width - length),
            )
            for row, length in enumerate(lengths)
        ]
        return torch.stack(rows)

    def buffer(self, positions: int, device: torch.device) -> torch.Tensor:
        """[chunk, V] memory for `logits` to write into, chunk after chunk: on a CPU fresh memory
        of this size costs more than the arithmetic done in it."""
        return torch.empty(min(self.chunk, positions), self.vocabulary, device=device)

    def real_weight(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[V, D] the head without its padding rows, as a constant in the given precision."""
        return None if self.weight is None else self.weight.detach()[: self.vocabulary].to(dtype)

    def logits(
        self, hidden_MD: torch.Tensor, buffer: torch.Tensor, weight_VD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[M, V] fp32 logits of the given positions, in the first rows of `buffer`.

        weight_VD  `real_weight` of these positions' precision, where the caller has it at hand
        """
        logits = buffer[: len(hidden_MD)]
        if self.whole:
            return logits.copy_(hidden_MD)
        weight = self.real_weight(hidden_MD.dtype) if weight_VD is None else weight_VD
        assert weight is not None
        if hidden_MD.dtype == logits.dtype:
            torch.mm(hidden_MD, weight.t(), out=logits)
        else:
            logits.copy_(functional.linear(hidden_MD, weight))
        if self.bias is not None:
            logits.add_(self.bias.detach()[: self.vocabulary])
        return self.finish(logits)

    def finish(self, logits_MV: torch.Tensor) -> torch.Tensor:
        """Apply, in place, what the model does after its head."""
        if self.scale != 1.0:
            logits_MV.mul_(self.scale)
        if self.softcap is not None:
            logits_MV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_MV


def _real(device: torch.device) -> torch.device:
    """Weights that wait on the disk or in memory are computed with where the accelerator is."""
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _accelerator_share() -> int:
    """Elements of a chunk that an accelerator has room for; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(0).total_memory) // (4 * _DEVICE_SHARE)


def connect_head(model: Any, vocabulary: int, report: Reporter = silent) -> OutputHead:
    """Split `model` at its head, or fall back to its full logits and say so.

    Raises
        ColdstillError: it cannot be run, or what it says of a token depends on later ones
    """
    own_TV = _own_logits(model, vocabulary)
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _number(getattr(config, "logit_scale", None))
    divisor = _number(getattr(config, "logits_scaling", None))
    try:
        guess = OutputHead(model, vocabulary, scale=scale / divisor, softcap=softcap)
        if _agrees(guess, own_TV):
            return guess
    except Exception:  # a model that is not built this way raises anything; the fallback serves it
        pass
    report(
        Report(
            stage="head",
            note=f"{config.model_type}: its head does something unknown after the last layer; "
            "computing full logits, which takes more memory",
            warning=True,
        )
    )
    return OutputHead(model, vocabulary, whole=True)


def _number(value: Any) -> float:
    """A factor in a configuration; 1 where there is none."""
    return float(value) if isinstance(value, int | float) and value else 1.0


def _tokens(vocabulary: int) -> torch.Tensor:
    """[1, 8] any tokens."""
    return torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _own_logits(model: Any, vocabulary: int) -> torch.Tensor:
    """[8, V] what the whole model says of eight tokens.

    Raises
        ColdstillError: it cannot be run on them, or looks at later tokens
    """
    kind = model.config.get_text_config().model_type
    where = f"a {kind!r} model"
    tokens = _tokens(vocabulary)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    with _evaluating(model), asking("transformers", "run it", where=where, remedy=_ANOTHER):
        first, second = (
            model(input_ids=ids.to(model.device), use_cache=False).logits for ids in (tokens, other)
        )
        own_TV: torch.Tensor
        other_TV: torch.Tensor
        own_TV, other_TV = (each[0, :, :vocabulary].float() for each in (first, second))
    before, after = own_TV[:-1], other_TV[:-1]
    real = before.isfinite() & after.isfinite()
    moved = torch.where(real, before - after, 0.0).abs().max() if len(before) else 0.0
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if moved > tolerance * torch.where(real, before, 0.0).abs().max():
        raise ColdstillError(
            f"{where}: what it says of a token depends on the tokens that follow, so it is no "
            f"causal language model; {_ANOTHER}"
        )
    return own_TV


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def _agrees(head: OutputHead, own_TV: torch.Tensor) -> bool:
    model = head.model
    if model.base_model is model:
        return False
    with _evaluating(model):
        hidden = head.hidden({"input_ids": _tokens(head.vocabulary).to(model.device)})[0]
        ours = head.logits(hidden, head.buffer(len(hidden), hidden.device))
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    # what is no number on both sides is another fault than the head's, told where it is met
    real = own_TV.isfinite()
    if not torch.equal(real, ours.isfinite()):
        return False
    difference = torch.where(real, own_TV - ours, 0.0).abs().max()
    return bool(difference <= tolerance * torch.where(real, own_TV, 0.0).abs().max())
