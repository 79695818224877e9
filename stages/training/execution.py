"""How a model runs while it trains: checkpointed and compiled blocks, sharded weights.

Everything is undone after the training. Blocks (transformer layers) are checkpointed and compiled
one by one: they are alike, so that one compilation serves all, and their activations take most of
the memory. The output head and the loss are excluded: they process one chunk at a time and keep
nothing (`chunked_loss`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from ..config import TrainConfig


def named_blocks(model: Any) -> tuple[str, torch.nn.ModuleList] | None:
    """The list of a model's blocks with its full name, or None if it is ambiguous.

    It is the only list of `num_hidden_layers` modules that is not inside another such list.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: list[tuple[str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not inside:
            found.append((name, module))
    return found[0] if len(found) == 1 else None


@contextlib.contextmanager
def running_blocks(model: Any, config: TrainConfig, where: str) -> Iterator[None]:
    """Checkpoint and compile a model's blocks as configured; undo it afterwards.

    where  the recipe's table, for messages

    Raises
        ColdstillError: the model does not support it, or torch.compile does not work here
    """
    with contextlib.ExitStack() as held:
        if config.gradient_checkpointing:
            _checkpoint(model, f"{where}.gradient_checkpointing")
            held.callback(model.activation_checkpointing_disable)
        if config.compile:
            _compile(model, f"{where}.compile", held)
        yield


def _checkpoint(model: Any, where: str) -> None:
    try:
        # the reentrant kind needs inputs with a gradient, which frozen embeddings do not have
        model.activation_checkpointing_enable({"use_reentrant": False})
    except (NotImplementedError, ValueError) as error:
        raise ColdstillError(
            f"{where}: a {model.config.model_type!r} model does not support it; remove it, or "
            "lower micro_batch_tokens instead"
        ) from error


def _compile(model: Any, where: str, held: contextlib.ExitStack) -> None:
    """Compile the blocks. `held` gets the callbacks that undo it."""
    # a block would fail only in its first forward pass
    if reason := _no_compiler(torch.cuda.is_available()):
        raise ColdstillError(
            f"{where}: torch.compile does not work on this machine: {reason}; remove it, or "
            "install a C++ compiler (on a GPU, Triton)"
        )
    for module in model.modules():
        hooks = module._forward_hooks
        for key, hook in list(hooks.items()):
            # `output_hidden_states` left it behind, and training does not use its records
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                held.callback(hooks.__setitem__, key, hooks.pop(key))  # it breaks compiled graphs
    found = named_blocks(model)
    for module in [model.base_model] if found is None else found[1]:
        # only the forward: names stay as they are, and hooks (such as of sharding) run outside
        module.forward = torch.compile(module.forward)
        held.callback(delattr, module, "forward")


@functools.cache
def _no_compiler(cuda: bool) -> str | None:
    """The error of compiling a tiny function, or None if it works."""

    def smallest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.sin() + 1

    try:
        torch.compile(smallest)(torch.zeros(8, device="cuda" if cuda else "cpu"))
    except Exception as error:  # compilers raise errors of any type
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200].rstrip(" .:;")
    return None


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
