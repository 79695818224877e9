"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a model, through `peft`.

The adapters go into the model in place, so that everyone else still sees the plain model: its head
is found, its loss attached and its checkpoints written as of any other.
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
    """Refuse at once what needs a package that is not here.

    Raises
        ColdstillError: `peft` is not installed
    """
    if importlib.util.find_spec("peft") is None:
        raise ColdstillError(
            f"{where}: needs the package 'peft', which is not installed; "
            "pip install 'coldstill[lora]'"
        )


def adapt(model: Any, config: LoraConfig, seed: int, where: str) -> Any:
    """Freeze a model and put adapters into it; what comes back is for `merge`.

    Until they are merged, the model saves its adapters only: a checkpoint of the frozen weights
    would be a copy of the base at every `checkpoint_every`.

    Raises
        ColdstillError: `peft` is missing, or the model has no such layers
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
        before = _said(model)
        # peft asks for gradient checkpointing by a name that transformers has given up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapper = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=names,
                # GPT-2 keeps its matrices the other way round
                fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
            ),
        )
        after = _said(model)
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-2 * float(before.abs().max())):
        raise ColdstillError(
            f"{where}: adapters that have learned nothing change what a {kind!r} model says; "
            f"{_OTHERS}"
        )
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    # a tied head stands in the state by a name of its own, so the state is asked, not the weights
    model._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in learned}
    return wrapper


@torch.no_grad()
def _said(model: Any) -> torch.Tensor:
    """What a model says of a few tokens: one of its layers may be of a kind that takes none."""
    training = model.training
    tokens = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    model.train(training)
    return logits.float().nan_to_num()


def merge(wrapper: Any) -> None:
    """Add the adapters into the weights they belong to, in place: a plain model is left."""
    model = wrapper.get_base_model()
    wrapper.merge_and_unload()
    model._keys_to_ignore_on_save = type(model)._keys_to_ignore_on_save
    model.requires_grad_(True)


def adapted_layers(model: Any, targets: str | tuple[str, ...], where: str) -> list[str]:
    """Full names of the layers that get adapters.

    targets  `all-linear`, which is every linear layer but the head, or layers by the end of their
             names

    Raises
        ColdstillError: a name that no linear layer has, or the head's (with tied embeddings its
            matrix is the input's too, and the loss reads it as it is)
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
                f"{where}.targets: no linear layer below the head is called {target!r}; choose "
                f"among {have}, or 'all-linear'"
            )
        found.update(named)
    return [name for name in linear if name in found]
