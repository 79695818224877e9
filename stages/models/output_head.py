"""Computing the logits of a few positions at a time from hidden states.

Full logits `[B, T, V]` take most of the memory of a small model, so they are never computed: the
transformer runs without its head, and the head is applied to a few hundred positions at a time.
Some models also scale or soft-cap their logits. `connect_head` compares its result with the model's
own logits and falls back to the whole model if they differ.
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
from .inputs import attention_windows, inputs_on, model_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...data.schema import Sequences
    from .inputs import Isolation

_ANOTHER = "choose another model"
_DEVICE_SHARE = 128
"""On an accelerator a chunk may take this fraction (1/128) of its memory: it needs more rows to be
busy, and has more memory."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """A model split at its output head. Its logits cover the real vocabulary only."""

    model: Any
    vocabulary: int
    """V, the real vocabulary: further rows of the head are padding and never computed."""
    scale: float = 1.0
    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)`."""
    whole: bool = False
    """Whether this is the fallback: `hidden` returns final logits, which `logits` only copies."""

    @property
    def weight(self) -> torch.Tensor | None:
        """[>= V, D] the matrix that multiplies the hidden states; None in the fallback.

        It is the output embedding, or its rounded form while a student of few bits is trained. The
        gradient of the rounded form is that of the embedding.
        """
        if self.whole:
            return None
        matrix: torch.Tensor = self._module.weight
        rounding = getattr(self._module, "weight_fake_quantizer", None)  # of torchao's layers
        return matrix if rounding is None else rounding(matrix)

    @property
    def _module(self) -> Any:
        return self.model.get_output_embeddings()

    @property
    def bias(self) -> torch.Tensor | None:
        """[>= V] the bias of the head; None if it has none, and in the fallback."""
        return None if self.whole else getattr(self._module, "bias", None)

    @property
    def width(self) -> int:
        """D, the size of the hidden states; V in the fallback."""
        return self.vocabulary if self.whole else int(self._module.weight.shape[1])

    @property
    def device(self) -> torch.device:
        """The device of the head; a model may be spread over several devices."""
        return _real(self.model.device if self.whole else self._module.weight.device)

    @property
    def input_device(self) -> torch.device:
        """The device for token ids."""
        return _real(self.model.get_input_embeddings().weight.device)

    @property
    def chunk(self) -> int:
        return chunk_rows(self.vocabulary, max(CHUNK_ELEMENTS, _accelerator_share()))

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """[B, T, D] inputs of the head; [B, T, V] logits in the fallback.

        With `lengths` `[B]` among the inputs each row is computed alone, without its padding.
        """
        if "lengths" in inputs:
            return self._one_by_one(inputs["input_ids"], inputs["lengths"].tolist())
        if self.whole:
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
            return logits[..., : self.vocabulary]
        states: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        rounding = getattr(self._module, "activation_fake_quantizer", None)  # as for `weight`
        return states if rounding is None else rounding(states)

    def inputs(self, sequences: Sequences, isolation: Isolation) -> dict[str, Any]:
        """What `hidden` takes for some sequences, on the host."""
        model = self.model
        return model_inputs(sequences, isolation, model.dtype, attention_windows(model.config))

    def read(self, sequences: Sequences, isolation: Isolation) -> torch.Tensor:
        """`hidden` of some sequences, on the model's device."""
        return self.hidden(inputs_on(self.model.device, self.inputs(sequences, isolation)))

    def _one_by_one(self, ids_BT: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        width = ids_BT.shape[1]
        rows = (
            self.hidden({"input_ids": ids_BT[row : row + 1, :length]})[0]
            for row, length in enumerate(lengths)
        )
        return torch.stack([functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])

    def buffer(self, positions: int, device: torch.device, *, least: int = 0) -> torch.Tensor:
        """[chunk, V] memory that `logits` writes into, one chunk after the other.

        On a CPU, allocating this size each time costs more than the arithmetic.

        least  positions that must fit into a chunk
        """
        rows = min(max(self.chunk, least), positions)
        return torch.empty(rows, self.vocabulary, device=device)

    def real_weight(
        self, dtype: torch.dtype, weight: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """[V, D] the head without padding rows, detached, in the given dtype.

        weight  `weight`, if the caller already has it
        """
        weight = self.weight if weight is None else weight
        return None if weight is None else weight.detach()[: self.vocabulary].to(dtype)

    def logits(
        self, hidden_MD: torch.Tensor, buffer: torch.Tensor, weight_VD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[M, V] fp32 logits of the given positions, in the first rows of `buffer`.

        weight_VD  `real_weight` in the dtype of `hidden_MD`, if the caller already has it
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
        """Scale and soft-cap logits in place, as the model does after its head."""
        if self.scale != 1.0:
            logits_MV.mul_(self.scale)
        if self.softcap is not None:
            logits_MV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_MV


def _real(device: torch.device) -> torch.device:
    """The device that computes; offloaded weights on `meta` are computed on the accelerator."""
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _accelerator_share() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(0).total_memory) // (4 * _DEVICE_SHARE)


def connect_head(model: Any, vocabulary: int, report: Reporter = silent) -> OutputHead:
    """Split `model` at its head, or report the fallback to full logits.

    Raises
        ColdstillError: the model cannot run, or its logits depend on later tokens
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
    except Exception:  # models with another structure raise any class; they get the fallback
        pass
    note = (
        f"{config.model_type}: its head does something unknown after the last layer; computing "
        "full logits, which takes more memory"
    )
    report(Report(stage="head", note=note, warning=True))
    return OutputHead(model, vocabulary, whole=True)


def _number(value: Any) -> float:
    """A factor of a configuration; 1 if it is not set."""
    return float(value) if isinstance(value, int | float) and value else 1.0


def _tokens(vocabulary: int) -> torch.Tensor:
    """[1, 8] random tokens."""
    return torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _own_logits(model: Any, vocabulary: int) -> torch.Tensor:
    """[8, V] logits of the whole model for eight tokens."""
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
            f"{where}: its logits for a token depend on the tokens that follow, so it is not a "
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
    # NaN on both sides is not a fault of the head; other checks report it
    real = own_TV.isfinite()
    if not torch.equal(real, ours.isfinite()):
        return False
    difference = torch.where(real, own_TV - ours, 0.0).abs().max()
    return bool(difference <= tolerance * torch.where(real, own_TV, 0.0).abs().max())
