"""A model's blocks (its transformer layers): where they are, and two ways of running them.

Compiling and checkpointing are done block by block: blocks are alike, so one is compiled for all,
and what a block kept for the backward pass is what there is most of. The output head and the loss
stay outside both: they work a chunk at a time and remember nothing (`chunked_loss`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..config import TrainConfig


def named_blocks(model: Any) -> tuple[str, torch.nn.ModuleList] | None:
    """The list of a model's blocks with its full name, or None if there is no telling.

    It is the only list of `num_hidden_layers` modules that does not lie inside another one.
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
    """Run a model's blocks as `gradient_checkpointing` and `compile` ask; as before afterwards.

    where  the recipe's table, for messages

    Raises
        ColdstillError: the model cannot, or nothing can be compiled on this machine
    """
    with contextlib.ExitStack() as held:
        if config.gradient_checkpointing:
            _checkpoint(model, f"{where}.gradient_checkpointing")
            held.callback(model.activation_checkpointing_disable)
        if config.compile:
            held.enter_context(_compiled(model, f"{where}.compile"))
        yield


def _checkpoint(model: Any, where: str) -> None:
    try:
        # the other kind needs inputs with a gradient, which frozen embeddings do not give
        model.activation_checkpointing_enable({"use_reentrant": False})
    except (NotImplementedError, ValueError) as error:
        raise ColdstillError(
            f"{where}: a {model.config.model_type!r} model cannot; remove it, or lower "
            "micro_batch_tokens instead"
        ) from error


@contextlib.contextmanager
def _compiled(model: Any, where: str) -> Iterator[None]:
    _expect_compiler(where)
    found = named_blocks(model)
    modules = [model.base_model] if found is None else [*found[1]]
    with _without_recorders(model):
        for module in modules:
            # its forward alone: names stay as they are, and hooks (of sharding, say) outside
            module.forward = torch.compile(module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


@contextlib.contextmanager
def _without_recorders(model: Any) -> Iterator[None]:
    """Hooks that `output_hidden_states` has left behind: they tear a compiled graph apart, and in
    training nobody asks for what they record."""
    held = [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
    ]
    for module, key, _ in held:
        del module._forward_hooks[key]
    try:
        yield
    finally:
        for module, key, hook in held:
            module._forward_hooks[key] = hook


def _expect_compiler(where: str) -> None:
    """Refuse at once: a block would fail only when training has begun."""
    if reason := _no_compiler(torch.cuda.is_available()):
        raise ColdstillError(
            f"{where}: torch.compile does not work on this machine: {reason}; remove it, or "
            "install a C++ compiler (on a GPU, Triton)"
        )


@functools.cache
def _no_compiler(cuda: bool) -> str | None:
    """What goes wrong when a few numbers are added by compiled code; None if nothing does."""

    def smallest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.sin() + 1

    try:
        torch.compile(smallest)(torch.zeros(8, device="cuda" if cuda else "cpu"))
    except Exception as error:  # compilers fail in ways of their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200].rstrip(" .:;")
    return None
