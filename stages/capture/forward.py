"""Runs batches of sequences through the teacher: token ids in, targets out.

The accelerator never waits: another thread prepares the inputs, and the targets of a batch are
copied to the host while the next batch is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from ...data.alignment import labels
from ...data.errors import ColdstillError, first_line
from ...data.order import uniform
from ..models.device import is_out_of_memory
from ..models.engines.engine import states_of
from ..models.inputs import flat_positions, inputs_on, map_inputs
from ..report import Report, Reporter, silent
from ..targets.tensors import TargetTensors
from .selection import select
from .served import ServedForward, ServedTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...data.schema import Capture, Sequences, Targets
    from ..models.output_head import OutputHead
    from .teacher import AnyTeacher, Teacher

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Sequences and the tensors of their forward pass, on the host."""

    sequences: Sequences
    inputs: dict[str, Any]
    """Inputs of the model's forward pass, as `OutputHead.inputs`."""
    positions: torch.Tensor
    """[M] indices of the supervised positions in the flattened `B * T`."""
    labels: torch.Tensor
    """[M] int64."""
    uniform: torch.Tensor
    """[M] float64, one random number per position."""
    tokens: int
    """Of the batch, with padding."""
    states: Callable[[], torch.Tensor] | None = None
    """Waits for an engine's states at the supervised positions, `[M, D]`; then there are no
    inputs."""


def prepare(teacher: Teacher, sequences: Sequences, seed: int, *, pin: bool) -> Prepared:
    """Make all tensors of a forward pass on the host. An engine begins its own at once.

    pin  use pinned memory, from which an accelerator copies asynchronously
    """
    inputs: dict[str, Any] = {}
    width, states = 0, None
    if teacher.engine is not None:
        states = states_of(teacher.engine, sequences)
    else:
        inputs = teacher.head.inputs(sequences, teacher.isolation)
        width = inputs["input_ids"].shape[1]
    ids_M = np.repeat(sequences.ids, sequences.positions.lengths)
    parts = {
        **inputs,
        "positions": flat_positions(sequences, width),
        "labels": torch.from_numpy(labels(sequences).astype(np.int64)),
        "uniform": torch.from_numpy(uniform(seed, ids_M, sequences.positions.values)),
    }
    if pin:
        parts = map_inputs(parts, lambda tensor: tensor.pin_memory())
    own = {name: parts.pop(name) for name in ("positions", "labels", "uniform")}
    tokens = len(sequences) * width or len(sequences.tokens.values)
    return Prepared(sequences, parts, **own, tokens=tokens, states=states)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some supervised positions of a batch, on the device of the output head."""

    hidden_MD: torch.Tensor
    """Hidden states before the output head."""
    logits_MV: torch.Tensor
    """fp32, real vocabulary only; overwritten by the next chunk."""
    labels_M: torch.Tensor
    uniform_M: torch.Tensor


class ChunkedForward:
    """Runs the model on a batch and its output head on one chunk of positions at a time.

    The memory for logits is kept from batch to batch.
    """

    def __init__(self, head: OutputHead) -> None:
        self._head = head
        self._buffer: torch.Tensor | None = None

    @torch.no_grad()
    def chunks(self, batch: Prepared) -> Iterator[Chunk]:
        """All supervised positions of a batch, in order."""
        head = self._head
        hidden_MD = self._hidden(batch)
        labels_M = batch.labels.to(head.device, non_blocking=True)
        uniform_M = batch.uniform.to(head.device, non_blocking=True)
        if self._buffer is None or len(self._buffer) < min(head.chunk, len(hidden_MD)):
            self._buffer = None  # before the larger one is allocated
            self._buffer = head.buffer(len(hidden_MD), head.device)
        buffer = self._buffer
        # a batch without any supervised position gives one empty chunk
        for start in range(0, max(1, len(hidden_MD)), max(1, len(buffer))):
            rows = slice(start, start + len(buffer))
            logits = head.logits(hidden_MD[rows], buffer)
            yield Chunk(hidden_MD[rows], logits, labels_M[rows], uniform_M[rows])

    def _hidden(self, batch: Prepared) -> torch.Tensor:
        """[M, D] the states at the supervised positions, on the device of the head."""
        head = self._head
        if batch.states is not None:
            hidden_MD = batch.states()
            if not len(hidden_MD):  # an engine that was asked nothing does not know D
                hidden_MD = hidden_MD.new_zeros(0, head.width)
            return hidden_MD.to(head.device, head.model.dtype, non_blocking=True)
        inputs = inputs_on(head.input_device, batch.inputs, non_blocking=True)
        states = head.hidden(inputs).flatten(0, 1)
        positions = batch.positions.to(states.device, non_blocking=True)
        return states[positions].to(head.device)

    def free(self) -> None:
        self._buffer = None


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """Targets that an accelerator may still be computing or copying."""

    sequences: Sequences
    teacher: str
    split: str
    parts: list[TargetTensors]
    copied: Any = None
    """CUDA event after which the parts are on the host; None without an accelerator."""

    def targets(self) -> Targets:
        """Wait for the targets and check them.

        Raises
            ColdstillError: a logit is NaN or infinite (names sequence and position)
        """
        if self.copied is not None:
            self.copied.synchronize()
        targets = TargetTensors.concatenate(self.parts).to_targets()
        # a NaN or infinity among the logits changes the normaliser and with it both of these
        bad = ~(np.isfinite(targets.entropy) & np.isfinite(targets.label_logprob))
        if bad.any():
            sequences, first = self.sequences, int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(sequences.positions.offsets, first, side="right")) - 1
            raise ColdstillError(
                f"{self.teacher}: its logits are not finite at {self.split} sequence "
                f"{int(sequences.ids[row])}, position {int(sequences.positions.values[first])}, so "
                "no target of it is stored; try teacher.dtype = 'fp32'"
            )
        return targets


class Begun(Protocol):
    """A batch whose work has begun."""

    @property
    def sequences(self) -> Sequences: ...


class Waiting(Protocol):
    """Targets that are still being computed."""

    @property
    def sequences(self) -> Sequences: ...

    def targets(self) -> Targets:
        """Wait for them. Raises ColdstillError if they cannot be had."""


class Forward(Protocol):
    """What captures batches of sequences."""

    budget: int
    """Most tokens of a batch."""

    @property
    def pin(self) -> bool:
        """Whether the work is an accelerator's, so that this machine's cores are free."""

    def prepare(self, sequences: Sequences) -> Begun:
        """Begin a batch; any thread may call this."""

    def capture(self, batch: Any) -> Iterator[Waiting]:
        """Targets of a batch that `prepare` gave, in one part or in several."""

    def answered(
        self, prompts: Sequences, longest: int, ask: Callable[[Sequences], Sequences]
    ) -> Iterator[Sequences]:
        """Results of `ask` for all prompts, in one part or in several.

        longest  most tokens of a prompt with its answer
        """


class TeacherForward:
    """Captures batches; continues with smaller batches when memory runs out."""

    def __init__(
        self,
        teacher: Teacher,
        capture: Capture,
        budget: int,
        report: Reporter = silent,
        split: str = "",
    ) -> None:
        """Capture with at most `budget` tokens in a batch; `split` is for messages."""
        self._teacher, self._capture, self._report = teacher, capture, report
        self._split = split
        self.budget = budget
        """Halved whenever memory runs out; later batches are planned with it."""
        self._forward = ChunkedForward(teacher.head)

    @property
    def pin(self) -> bool:
        return self._teacher.head.device.type == "cuda"

    def prepare(self, sequences: Sequences) -> Prepared:
        """Prepare a batch; any thread may call this."""
        return prepare(self._teacher, sequences, self._capture.seed, pin=self.pin)

    def capture(self, batch: Prepared) -> Iterator[Pending]:
        """Targets of a batch, in one part or in several if the batch does not fit into memory.

        Raises
            ColdstillError: a single sequence does not fit into memory
        """
        yield from self._fitting(
            batch.sequences,
            batch.tokens,
            lambda: self._capture_whole(batch),
            lambda part: self.capture(self.prepare(part)),
        )

    def answered(
        self, prompts: Sequences, longest: int, ask: Callable[[Sequences], Sequences]
    ) -> Iterator[Sequences]:
        """Results of `ask` for all prompts, in one part or in several if memory runs out.

        longest  most tokens of a prompt with its answer
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
        """The result for all sequences or, if memory runs out, for each half of them."""
        # more tokens than the budget: the batch was planned before the budget was halved
        if len(sequences) == 1 or tokens <= self.budget:
            try:
                yield whole()
                return
            except ColdstillError:
                raise
            except Exception as error:  # models raise any exception
                self._expect_divisible(error, len(sequences), tokens)
            # outside the except clause: the error refers to every tensor of the failed pass
            self._shrink(tokens)
        middle = len(sequences) // 2
        for rows in (np.arange(middle), np.arange(middle, len(sequences))):
            yield from half(sequences.take(rows))

    def _expect_divisible(self, error: Exception, rows: int, tokens: int) -> None:
        name, head = self._teacher.name, self._teacher.head
        if self._teacher.engine is not None and not is_out_of_memory(error):
            raise ColdstillError(
                f"{name}: the states of {rows} sequences cannot be used: {first_line(error)}"
            ) from error
        if not is_out_of_memory(error):
            raise ColdstillError(
                f"{name}: transformers cannot run a {head.model.config.model_type!r} model on "
                f"{rows} sequences of {tokens:,} tokens together: {first_line(error)}; try "
                "teacher.attention = 'eager', or choose another teacher"
            ) from error
        if self._teacher.lockstep:  # the other processes have finished this batch
            raise ColdstillError(
                f"{name}: not enough memory for a batch of {tokens:,} tokens; lower "
                "logits.batch_tokens"
            ) from error
        if rows == 1:
            raise ColdstillError(
                f"{name}: not enough memory for one sequence of {tokens} tokens on "
                f"{head.device}; lower corpus.sequence_length, choose "
                "teacher.dtype = 'bf16', or spread the teacher with teacher.device_map = 'auto'"
            ) from error

    def _shrink(self, tokens: int) -> None:
        self._forward.free()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.budget = max(1, min(self.budget, tokens) // 2)
        note = (
            f"out of memory with a batch of {tokens:,} tokens; continuing with {self.budget:,}, "
            "set logits.batch_tokens to start there"
        )
        self._report(Report(stage="teacher-logits", note=note, warning=True))

    def _capture_whole(self, batch: Prepared) -> Pending:
        teacher, head = self._teacher, self._teacher.head
        teacher.lead(batch.sequences)
        parts: list[TargetTensors] = []
        for chunk in self._forward.chunks(batch):
            parts += select(chunk.logits_MV, chunk.labels_M, chunk.uniform_M, self._capture)
        if head.device.type != "cuda":
            return Pending(batch.sequences, teacher.name, self._split, parts)
        on_host = _to_host(parts)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(head.device))
        return Pending(batch.sequences, teacher.name, self._split, [on_host], copied)


def forward_of(
    teacher: AnyTeacher,
    capture: Capture,
    budget: int,
    report: Reporter = silent,
    split: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> Forward:
    """What captures batches of about `budget` tokens; `split` is for messages. Once `stop` returns
    True, requests to a server end early."""
    if isinstance(teacher, ServedTeacher):
        return ServedForward(teacher, capture, budget, stop)
    return TeacherForward(teacher, capture, budget, report, split)


def capture_batch(
    teacher: AnyTeacher,
    sequences: Sequences,
    capture: Capture,
    split: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> Targets:
    """[M] targets of some sequences in one batch, without work in the background."""
    tokens = len(sequences) * int(sequences.tokens.lengths.max())
    forward = forward_of(teacher, capture, tokens, split=split, stop=stop)
    parts = [part.targets() for part in forward.capture(forward.prepare(sequences))]
    return parts[0] if len(parts) == 1 else type(parts[0]).concatenate(parts)


def _to_host(parts: list[TargetTensors]) -> TargetTensors:
    """Start copying all chunks to pinned memory, joined. The copy is complete at the stream's next
    event."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.float32 if tensor.is_floating_point() else torch.int32
        host = torch.empty(tensor.shape, dtype=kind, pin_memory=True)
        return host.copy_(tensor.to(kind), non_blocking=True)

    return TargetTensors.concatenate(parts).map(copy)
