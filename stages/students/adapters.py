"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a model, through `peft`.

Adapters are put into the model in place. Other code sees a plain model: its output head is found,
its loss attached and its checkpoints written as for any other model.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ...data.errors import ColdstillError
from ..libraries import asking

if TYPE_CHECKING:
    from ..config import LoraConfig

_OTHERS = "choose other layers with targets, such as ['q_proj', 'v_proj'], or train all weights"


def expect_peft(where: str) -> None:
    """Raise ColdstillError if `peft` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ColdstillError(
            f"{where}: needs the package 'peft', which is not installed; "
            "pip install 'coldstill[lora]'"
        )


def adapt(model: Any, config: LoraConfig, seed: int, where: str) -> Any:
    """Freeze a model and put adapters into it; returns the wrapper for `merge`.

    Until the adapters are merged, the model saves only them: the frozen weights would be copied
    into every checkpoint.

    Raises
        ColdstillError: `peft` is not installed, or the model has no such layers
    """
    expect_peft(where)
    import peft

    names = adapted_layers(model, config.targets, where)
    layers = [model.get_submodule(name) for name in names]
    torch.manual_seed(seed)
    kind = model.config.model_type
    with (
        asking("peft", f"put adapters into a {kind!r} model", where=where, remedy=_OTHERS),
        warnings.catch_warnings(),
    ):
        before = _logits(model)
        # peft reads an attribute that transformers has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapper = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=names,
                # GPT-2's matrices are transposed
                fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
            ),
        )
        after = _logits(model)
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-2 * float(before.abs().max())):
        raise ColdstillError(
            f"{where}: untrained adapters change the logits of a {kind!r} model; {_OTHERS}"
        )
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    # the state lists a tied head under its own name, the parameters do not
    model._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in learned}
    return wrapper


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Logits of a few tokens, to detect layers that adapters do not fit."""
    training = model.training
    tokens = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    model.train(training)
    return logits.float().nan_to_num()


def merge_adapters(wrapper: Any) -> None:
    """Add the adapters to their weights in place, which leaves a plain model."""
    model = wrapper.get_base_model()
    wrapper.merge_and_unload()
    model._keys_to_ignore_on_save = type(model)._keys_to_ignore_on_save
    model.requires_grad_(True)


def adapted_layers(model: Any, targets: str | tuple[str, ...], where: str) -> list[str]:
    """Full names of the layers that get adapters.

    targets  `all-linear` for every linear layer but the output head, or the ends of layer names

    Raises
        ColdstillError: a name matches no linear layer below the output head. The head itself cannot
            have adapters: with tied embeddings its matrix is also the input's, and the loss reads
            the matrix directly
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    if targets == "all-linear":
        return linear
    found: set[str] = set()
    for target in targets:
        named = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not named:
            have = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise ColdstillError(
                f"{where}.targets: no linear layer below the output head is named {target!r}; "
                f"choose among {have}, or 'all-linear'"
            )
        found.update(named)
    return [name for name in linear if name in found]
