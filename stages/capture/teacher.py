"""The loaded teacher: on one device, spread over several devices, or split across processes.

A teacher that does not fit on one accelerator is spread by `device_map` (one process, layers on
several devices) or by tensor parallelism (every layer in slices, one process of a `torchrun` per
slice). Quantised checkpoints load as `transformers` loads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ...data.errors import ColdstillError
from ..models.device import best_device
from ..models.engines import ENGINES
from ..models.inputs import inputs_on
from ..models.isolation import choose_isolation
from ..models.loading import load_config, load_head, load_model
from ..models.output_head import connect_head
from ..models.vocabulary import expect_rows
from ..ranks import rank, world_size
from ..report import Reporter, silent
from .generate import answer, answer_by_engine, choose_answering, end_tokens
from .served import ServedTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...data.schema import Sequences
    from ..models.engines.engine import Engine
    from ..models.inputs import Isolation
    from ..models.output_head import OutputHead
    from .generate import Answering
    from .plan import CapturePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A loaded teacher.

    With tensor parallelism every forward pass needs all processes, on the same batch. The first
    process reads, selects and writes (`lead`); the others compute their slices of the layers and
    discard the result (`follow`).
    """

    head: OutputHead
    isolation: Isolation
    answering: Answering | None = None
    """Which prompts can be answered together; None if that was not tested."""
    name: str = "teacher"
    """For messages."""
    lockstep: bool = False
    """Whether all processes run this teacher together, each with a slice of every layer."""
    engine: Engine | None = None
    """Runs the layers in place of this process; `head` then has none."""

    @property
    def is_whole(self) -> bool:
        """Whether this process can run the whole model by itself, which its cost is measured on."""
        return not self.lockstep and self.engine is None

    @property
    def device(self) -> torch.device:
        """Where the output head is."""
        return self.head.device

    @property
    def runtime(self) -> str:
        """Name and version of the program that runs the layers."""
        return self.engine.version if self.engine else f"torch {torch.__version__}"

    def close(self) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            self.engine.close()

    @property
    def follows(self) -> bool:
        """Whether this process only computes slices for the first process."""
        return self.lockstep and rank() > 0

    def answer(
        self, plan: CapturePlan, prompts: Sequences, stop: Callable[[], bool] = lambda: False
    ) -> Sequences:
        """Prompts of a capture with this teacher's answers; raises as `generate.answer`.

        stop  as for `generate.answer`
        """
        assert plan.generate is not None
        ends = end_tokens(self.head.model, plan.tokenizer)
        if self.engine is not None:
            return answer_by_engine(
                self.engine,
                prompts,
                plan.generate,
                seed=plan.capture.seed,
                ends=ends,
                sequence_length=plan.sequence_length,
                stop=stop,
            )
        return answer(
            self.head,
            prompts,
            plan.generate,
            seed=plan.capture.seed,
            ends=ends,
            sequence_length=plan.sequence_length,
            answering=self.answering,
            stop=stop,
        )

    def lead(self, sequences: Sequences | None) -> None:
        """Send the next batch to the following processes; None ends their loop. Does nothing
        without tensor parallelism."""
        if self.lockstep:
            distributed.broadcast_object_list([sequences], src=0)

    def follow(self, inputs_of: Callable[[Sequences], Mapping[str, Any]]) -> None:
        """Compute this process's slices until the first process sends None.

        inputs_of  makes the inputs of the model's forward pass, on the host
        """
        while True:
            received: list[Any] = [None]
            distributed.broadcast_object_list(received, src=0)
            if received[0] is None:
                return
            inputs = inputs_of(received[0])
            with torch.no_grad():
                self.head.hidden(inputs_on(self.head.input_device, inputs))


AnyTeacher = Teacher | ServedTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a teacher is loaded."""

    dtype: str
    """`auto`, `fp32`, `bf16` or `fp16`."""
    revision: str = "main"
    attention: str | None = None
    """Any `attn_implementation` of transformers."""
    device_map: str | dict[str, int | str] | None = None
    """`auto` or a device for each part, as transformers takes it."""
    tensor_parallel: bool = False
    compiled: bool = False
    own_code: bool = False
    engine: str = "transformers"
    """`transformers`, or another program that runs the model."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Passed to that program as they are."""


def load_teacher(
    name: str,
    where: str,
    loading: Loading,
    *,
    vocabulary: int,
    sequence_length: int,
    together: bool = True,
    generate: bool = False,
    report: Reporter = silent,
) -> Teacher:
    """Load a teacher and test what it supports.

    together  whether documents share sequences
    generate  whether the teacher will answer prompts
    """
    if loading.engine != "transformers":
        return _engine_teacher(
            name, where, loading, vocabulary, sequence_length, generate=generate, report=report
        )
    options: dict[str, Any] = {}
    if loading.tensor_parallel:
        _expect_divisible(name, where, loading)
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    elif loading.device_map is not None:
        options["device_map"] = loading.device_map
    model = load_model(
        name,
        where,
        precision=loading.dtype,
        attention=loading.attention,
        revision=loading.revision,
        own_code=loading.own_code,
        options=options,
    )
    expect_rows(model, vocabulary, where)
    if not options and not getattr(model, "is_quantized", False):
        model.to(best_device())
    if loading.tensor_parallel:
        _gather_head(model)
    head = connect_head(model, vocabulary, report)
    isolation = choose_isolation(
        model, vocabulary, sequence_length, together=together, where=where, report=report
    )
    answering = choose_answering(head, sequence_length, where, report) if generate else None
    if loading.compiled:  # after the tests above, which use shapes of their own
        model.base_model.compile(dynamic=True)
        if head.whole:
            model.compile(dynamic=True)
    return Teacher(
        head=head, isolation=isolation, answering=answering, lockstep=loading.tensor_parallel
    )


def _engine_teacher(
    name: str,
    where: str,
    loading: Loading,
    vocabulary: int,
    sequence_length: int,
    *,
    generate: bool,
    report: Reporter,
) -> Teacher:
    """A teacher whose layers an engine runs; its head is on this process's device."""
    if world_size() > 1 and torch.cuda.is_available():
        raise ColdstillError(
            f"teacher.engine: {world_size()} processes of torchrun would start {loading.engine} on "
            "the same GPU; start one process and divide the teacher by engine_options "
            "(tensor_parallel_size), or start several by hand, each with its CUDA_VISIBLE_DEVICES"
        )
    model = load_head(
        name,
        where,
        precision=loading.dtype,
        revision=loading.revision,
        own_code=loading.own_code,
    )
    expect_rows(model, vocabulary, where)
    model.to(best_device())
    head = connect_head(model, vocabulary, report)
    if head.whole:
        raise ColdstillError(
            f"{where}: {name}: a {model.config.model_type!r} model changes its logits in a way "
            "that is not known, and an engine gives states only; remove teacher.engine"
        )
    engine = ENGINES[loading.engine].started(
        name,
        where,
        dtype=str(model.dtype).removeprefix("torch."),
        revision=loading.revision,
        own_code=loading.own_code,
        sequence_length=sequence_length,
        head=head,
        generate=generate,
        options=loading.engine_options,
    )
    return Teacher(head=head, isolation="documents", engine=engine)


def expect_several_processes() -> None:
    """Refuse to split a teacher within a single process."""
    if world_size() < 2:
        raise ColdstillError(
            "teacher.tensor_parallel: needs several processes, this is one; start it with "
            "torchrun --nproc-per-node N --no-python coldstill teacher-logits ..."
        )


def _expect_divisible(name: str, where: str, loading: Loading) -> None:
    config = load_config(name, where, loading.revision, own_code=loading.own_code)
    text = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if heads is not None and heads % world_size():
            raise ColdstillError(
                f"{where}: {key} = {heads} of {name} cannot be split into {world_size()} equal "
                "slices; start a number of processes that divides it"
            )


def _gather_head(model: Any) -> None:
    """Make the output embedding whole in every process. Only the first process applies it, chunk by
    chunk, to hidden states that all processes have."""
    sliced = model.get_output_embeddings()
    weight, bias = (_whole(getattr(sliced, name, None)) for name in ("weight", "bias"))
    assert weight is not None
    size, width = weight.shape
    whole = torch.nn.Linear(width, size, bias=bias is not None, device="meta")
    whole.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        whole.bias = torch.nn.Parameter(bias, requires_grad=False)
    model.set_output_embeddings(whole)


def _whole(tensor: Any) -> torch.Tensor | None:
    if tensor is None:
        return None
    gathered: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach()
