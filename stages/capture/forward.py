"""Batches of sequences through the teacher: from token ids to targets on their way to the host.

The processor that runs the model is never kept waiting: what it needs was made ready by another
thread, and what it gives is copied while the next batch is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ...data.alignment import labels
from ...data.errors import ColdstillError
from ...data.order import uniform
from ..libraries import first_line
from ..models.isolation import flat_positions, model_inputs
from ..report import Report, Reporter, silent
from ..targets.tensors import TargetTensors
from .lockstep import lead
from .selection import select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...data.schema import Capture, Sequences, Targets
    from ..models.isolation import Isolation
    from .teacher import Teacher

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Sequences and the tensors that the teacher is asked with, on the host."""

    sequences: Sequences
    inputs: dict[str, torch.Tensor]
    """What the model's forward takes, `[B, T]`."""
    positions: torch.Tensor
    """[M] where the supervised positions lie in the flattened `B * T`."""
    labels: torch.Tensor
    """[M] int64."""
    uniform: torch.Tensor
    """[M] float64, one random number a position."""


def prepare(
    sequences: Sequences, isolation: Isolation, dtype: torch.dtype, seed: int, *, pin: bool
) -> Prepared:
    """Make everything ready that needs no accelerator.

    pin  into memory that an accelerator can fetch from by itself
    """
    inputs = model_inputs(sequences, isolation, dtype)
    ids_M = np.repeat(sequences.ids, sequences.positions.lengths)
    parts = {
        **inputs,
        "positions": flat_positions(sequences, inputs["input_ids"].shape[1]),
        "labels": torch.from_numpy(labels(sequences).astype(np.int64)),
        "uniform": torch.from_numpy(uniform(seed, ids_M, sequences.positions.values)),
    }
    if pin:
        parts = {name: tensor.pin_memory() for name, tensor in parts.items()}
    own = {name: parts.pop(name) for name in ("positions", "labels", "uniform")}
    return Prepared(sequences, parts, **own)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """Targets that an accelerator may still be computing or copying."""

    sequences: Sequences
    teacher: str
    """Its name, for messages,"""
    split: str
    """and whose sequences these are."""
    parts: list[TargetTensors]
    capture: Capture
    copied: Any = None
    """The event after which the parts are on the host; None if they always were."""

    def targets(self) -> Targets:
        """Wait for them.

        Raises
            ColdstillError: a logit is no number (sequence and position)
        """
        if self.copied is not None:
            self.copied.synchronize()
        targets = TargetTensors.concatenate(self.parts).to_targets()
        _expect_numbers(targets, self.sequences, self.teacher, self.split)
        return targets


class TeacherForward:
    """Captures batches; goes on with smaller ones when memory does not suffice."""

    def __init__(
        self,
        teacher: Teacher,
        capture: Capture,
        budget: int,
        report: Reporter = silent,
        split: str = "",
    ) -> None:
        """Capture with a loaded teacher.

        budget  tokens of a batch, padding included
        split   whose sequences they are, for messages
        """
        self._teacher, self._capture, self._report = teacher, capture, report
        self._name, self._split = teacher.name, split
        self.budget = budget
        """Halved whenever memory did not suffice; later batches are planned by it."""
        self._buffer: torch.Tensor | None = None

    @property
    def pin(self) -> bool:
        """Whether inputs should be in pinned memory."""
        return self._teacher.head.device.type == "cuda"

    def prepare(self, sequences: Sequences) -> Prepared:
        """Make a batch ready; any thread may do it."""
        model = self._teacher.head.model
        return prepare(
            sequences, self._teacher.isolation, model.dtype, self._capture.seed, pin=self.pin
        )

    def capture(self, batch: Prepared) -> Iterator[Pending]:
        """The batch's targets: at once, or in parts if it did not fit.

        Raises
            ColdstillError: not even one sequence fits
        """
        yield from self._fitting(
            batch.sequences,
            batch.inputs["input_ids"].numel(),
            lambda: self._forward(batch),
            lambda part: self.capture(self.prepare(part)),
        )

    def answered(
        self, prompts: Sequences, longest: int, ask: Callable[[Sequences], Sequences]
    ) -> Iterator[Sequences]:
        """What `ask` makes of prompts, at once or in parts likewise.

        longest  how many tokens prompt and answer may have together
        """
        yield from self._fitting(
            prompts,
            len(prompts) * longest,
            lambda: ask(prompts),
            lambda part: self.answered(part, longest, ask),
        )

    def _fitting(
        self,
        sequences: Sequences,
        tokens: int,
        whole: Callable[[], _Result],
        half: Callable[[Sequences], Iterator[_Result]],
    ) -> Iterator[_Result]:
        """All of it, or each half of it, as memory allows."""
        fits = len(sequences) == 1 or tokens <= self.budget  # planned before it was halved, if not
        if fits:
            try:
                yield whole()
                return
            except ColdstillError:
                raise
            except Exception as error:  # models raise anything
                self._expect_divisible(error, len(sequences), tokens)
            # outside the except clause: the error holds on to every tensor of the failed pass
            self._shrink(tokens)
        middle = len(sequences) // 2
        for rows in (np.arange(middle), np.arange(middle, len(sequences))):
            yield from half(sequences.take(rows))

    def _expect_divisible(self, error: Exception, rows: int, tokens: int) -> None:
        if not is_out_of_memory(error):
            kind = self._teacher.head.model.config.model_type
            raise ColdstillError(
                f"{self._name}: transformers cannot run a {kind!r} model on {rows} sequences of "
                f"{tokens:,} tokens together: {first_line(error)}; try teacher.attention = "
                "'eager', or choose another teacher"
            ) from error
        if self._teacher.lockstep:  # the others have gone on
            raise ColdstillError(
                f"{self._name}: not enough memory for {tokens:,} tokens to a batch; lower "
                "logits.batch_tokens"
            ) from error
        if rows == 1:
            raise ColdstillError(
                f"{self._name}: not enough memory for one sequence of {tokens} tokens on "
                f"{self._teacher.head.device}; lower corpus.sequence_length, choose "
                "teacher.dtype = 'bf16', or spread the teacher with teacher.device_map = 'auto'"
            ) from error

    def _shrink(self, tokens: int) -> None:
        self._buffer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.budget = max(1, min(self.budget, tokens) // 2)
        self._report(
            Report(
                stage="teacher-logits",
                note=f"out of memory with {tokens:,} tokens to a batch; going on with "
                f"{self.budget:,}, set logits.batch_tokens to begin there",
                warning=True,
            )
        )

    @torch.no_grad()
    def _forward(self, batch: Prepared) -> Pending:
        head, capture = self._teacher.head, self._capture
        lead(self._teacher, batch.sequences)
        inputs = {n: t.to(head.input_device, non_blocking=True) for n, t in batch.inputs.items()}
        states = head.hidden(inputs).flatten(0, 1)
        positions = batch.positions.to(states.device, non_blocking=True)
        hidden_MD = states[positions].to(head.device)
        del states
        labels_M = batch.labels.to(head.device, non_blocking=True)
        uniform_M = batch.uniform.to(head.device, non_blocking=True)
        buffer = self._room(len(hidden_MD))
        parts: list[TargetTensors] = []
        for start in range(0, len(hidden_MD), len(buffer)):
            rows = slice(start, start + len(buffer))
            logits = head.logits(hidden_MD[rows], buffer)
            parts.extend(select(logits, labels_M[rows], uniform_M[rows], capture))
        if head.device.type != "cuda":
            return Pending(batch.sequences, self._name, self._split, parts, capture)
        on_host = _to_host(parts)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(head.device))
        return Pending(batch.sequences, self._name, self._split, [on_host], capture, copied)

    def _room(self, positions: int) -> torch.Tensor:
        """Memory for logits, kept from batch to batch."""
        head = self._teacher.head
        wanted = min(head.chunk, positions)
        if self._buffer is None or len(self._buffer) < wanted:
            self._buffer = None  # before the larger one is made
            self._buffer = head.buffer(positions, head.device)
        return self._buffer


def capture_batch(
    teacher: Teacher, sequences: Sequences, capture: Capture, split: str = ""
) -> Targets:
    """[M] the targets of some sequences in one batch, without any work ahead or behind.

    Raises
        ColdstillError: a logit is no number, or there is too little memory
    """
    tokens = len(sequences) * int(sequences.tokens.lengths.max())
    forward = TeacherForward(teacher, capture, tokens, split=split)
    parts = [part.targets() for part in forward.capture(forward.prepare(sequences))]
    return parts[0] if len(parts) == 1 else type(parts[0]).concatenate(parts)


def _to_host(parts: list[TargetTensors]) -> TargetTensors:
    """Begin to copy all chunks to pinned memory, as one; the stream's next event says when."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.float32 if tensor.is_floating_point() else torch.int32
        host = torch.empty(tensor.shape, dtype=kind, pin_memory=True)
        return host.copy_(tensor.to(kind), non_blocking=True)

    return TargetTensors.concatenate(parts).map(copy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a processor had too little memory: on the CPU torch has no error of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def _expect_numbers(targets: Targets, sequences: Sequences, teacher: str, split: str) -> None:
    # any NaN or infinity among the logits spoils the normaliser, and with it every one of these
    bad = ~(np.isfinite(targets.entropy) & np.isfinite(targets.label_logprob))
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(sequences.positions.offsets, place, side="right")) - 1
        raise ColdstillError(
            f"{teacher}: its logits are not finite at {split} sequence {int(sequences.ids[row])}, "
            f"position {int(sequences.positions.values[place])}, so nothing of it is stored; try "
            "teacher.dtype = 'fp32'"
        )
