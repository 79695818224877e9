"""The teacher, loaded where it fits: on one device, spread over several, or cut across processes.

What cannot be on one accelerator is spread by `device_map` (layers here and there, one process) or
by tensor parallelism (every layer in slices, the processes of one `torchrun` in lockstep).
Quantised checkpoints load as `transformers` loads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...data.errors import ColdstillError
from ..models.device import best_device
from ..models.isolation_choice import choose_isolation
from ..models.loading import load_config, load_model
from ..models.output_head import connect_head
from ..models.vocabulary import expect_rows
from ..ranks import world_size
from ..report import Reporter, silent
from .answering import choose_answering
from .teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a teacher is loaded."""

    dtype: str
    """`auto`, `fp32`, `bf16` or `fp16`."""
    revision: str = "main"
    attention: str | None = None
    """Any `attn_implementation` of transformers."""
    device_map: str | dict[str, int | str] | None = None
    """As transformers takes it: `auto`, or a device for each part."""
    tensor_parallel: bool = False
    """Every layer in slices over all processes."""
    compiled: bool = False
    """Through `torch.compile`."""
    own_code: bool = False
    """Whether code that it brings may run."""


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
    """The teacher, ready to be asked.

    where     the recipe's key, for messages
    together  whether documents share sequences
    generate  whether it is to answer prompts

    Raises
        ColdstillError: there is no such model, or it cannot be placed as asked
    """
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
    if loading.compiled:  # after the checks: they ask with shapes of their own
        model.base_model.compile(dynamic=True)
        if head.whole:
            model.compile(dynamic=True)
    return Teacher(
        head=head, isolation=isolation, answering=answering, lockstep=loading.tensor_parallel
    )


def _expect_divisible(name: str, where: str, loading: Loading) -> None:
    config = load_config(name, where, loading.revision, own_code=loading.own_code)
    text = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if heads is not None and heads % world_size():
            raise ColdstillError(
                f"{where}: {key} = {heads} of {name} cannot be cut into {world_size()} equal "
                "slices; start as many processes as divide it"
            )


def expect_several_processes(where: str) -> None:
    """Refuse to cut a teacher into one slice; `where` names the recipe's key."""
    if world_size() < 2:
        raise ColdstillError(
            f"{where}: needs several processes, this is one; start it with "
            "torchrun --nproc-per-node N --no-python coldstill teacher-logits ..."
        )


def _gather_head(model: Any) -> None:
    """Make the output embedding whole in every process: the first one alone applies it, chunk by
    chunk, to hidden states that all have."""
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
