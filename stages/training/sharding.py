"""Training with weights that are sharded over processes (FSDP), and whole weights afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator


def shard_on_cpu(accelerator: Accelerator, plugin_arguments: dict[str, Any]) -> None:
    """Make accelerate shard weights on CPUs as well.

    accelerate supports it, but silently gives every CPU process a whole copy: `AcceleratorState`
    reads the sharding settings for accelerators only.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_inputs_exact(accelerator: Accelerator) -> None:
    """Compute in half precision without rounding targets and sums of gradients to it."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy,
            cast_forward_inputs=False,
            reduce_dtype=torch.float32,
            output_dtype=None,
        )


@contextlib.contextmanager
def whole_afterwards(model: Any) -> Iterator[None]:
    """Restore whole weights, hooks and classes of a model that is sharded inside the context.

    All processes must leave the context together, unless they fail.
    """
    before = [
        (module, type(module), {name: dict(hooks) for name, hooks in _hooks(module)})
        for module in model.modules()
    ]
    yield
    if not any(_is_sharded(weight) for weight in model.parameters()):
        return
    whole: dict[int, torch.nn.Parameter] = {}
    for module, own_class, own_hooks in before:
        for name, weight in module._parameters.items():
            if weight is not None and _is_sharded(weight):
                if id(weight) not in whole:  # tied weights stay tied
                    full = weight.detach().full_tensor()
                    whole[id(weight)] = torch.nn.Parameter(full, weight.requires_grad)
                module._parameters[name] = whole[id(weight)]
        module.__class__ = own_class
        for name, hooks in _hooks(module):
            hooks.clear()
            hooks.update(own_hooks[name])


def _hooks(module: Any) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if "_hooks" in name and value is not None and hasattr(value, "clear")
    ]


def _is_sharded(weight: Any) -> bool:
    return hasattr(weight, "full_tensor")
