"""A trial of a recipe's Trainer settings, before anything is read or written.

Optimisers, reporting integrations and schedules come from packages that may be missing, which shows
only when training starts. Here they are created once for a tiny model and dropped.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ...data.errors import ColdstillError
from ..libraries import asking
from .arguments import ADVICE, expect_honoured, training_arguments
from .feed import StepShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import TrainingArguments

    from ..config import TrainConfig

_OF_SEVERAL = ("fsdp", "fsdp_config", "deepspeed")
"""Settings that can only be tried by several processes."""
_OF_OPTIMISERS = {
    "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
}  # fmt: skip
"""Settings that only some optimisers read."""
_WEIGHTS = {"params", "model", "optimizer_dict"}
"""Options of an optimiser that hold the weights."""


def expect_trainable(config: TrainConfig, where: str) -> None:
    """Refuse settings that the Trainer would refuse at the start, as far as one process can tell.

    where  what is trained, for messages
    """
    if not config.trainer:
        return
    expect_honoured(config.trainer, where)
    if config.trainer.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ColdstillError(
            f"{where}: train.trainer: deepspeed: needs the package 'deepspeed', which is not "
            "installed; pip install deepspeed, or use fsdp"
        )
    given = {key: value for key, value in config.trainer.items() if key not in _OF_SEVERAL}
    with tempfile.TemporaryDirectory() as scratch:
        tried, shape = replace(config, trainer=given), StepShape(processes=1, passes=1, micro=1)
        arguments = training_arguments(tried, shape, 0, Path(scratch), where)
        place, remedy = f"{where}: train.trainer", "install it, or remove report_to"
        with asking("transformers", "report there", where=place, remedy=remedy):
            for board in get_reporting_integration_callbacks(arguments.report_to):
                board()
        try:
            expect_parts(arguments, torch.nn.Linear(2, 2), given, where)
        except ColdstillError as error:
            # the tiny model lacks these modules; the training itself reports missing ones
            if not (given.get("optim_target_modules") and isinstance(error.__cause__, ValueError)):
                raise


def expect_parts(
    arguments: TrainingArguments, model: torch.nn.Module, given: Mapping[str, Any], where: str
) -> None:
    """Create and drop the optimiser, the schedule and the data loader of the Trainer.

    given  the settings of the recipe among the arguments
    """
    place = f"{where}: train.trainer"
    name = getattr(arguments.optim, "value", arguments.optim)
    with asking("transformers", f"make the optimiser {name!r}", where=place, remedy=ADVICE):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        # some options hold the weights, and some optimisers are factories that need the model
        alone = isinstance(kind, type) and not _WEIGHTS & options.keys()
        optimiser = kind([torch.nn.Parameter(torch.zeros(2, 2))], **options) if alone else None
    _expect_used(arguments, model, given, place, name)
    if optimiser is not None:
        schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        with asking("transformers", f"make the schedule {schedule!r}", where=place, remedy=ADVICE):
            get_scheduler(
                arguments.lr_scheduler_type,
                optimizer=optimiser,
                num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
                num_training_steps=arguments.max_steps,
                scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
            )
    with asking("torch", "read batches so", where=place, remedy=ADVICE):
        DataLoader(
            TensorDataset(torch.zeros(1)),
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )


def _expect_used(
    arguments: TrainingArguments,
    model: torch.nn.Module,
    given: Mapping[str, Any],
    place: str,
    optimiser: str,
) -> None:
    """Refuse an optimiser setting that the chosen optimiser does not read."""
    defaults = {field.name: field.default for field in fields(arguments)}
    for name in _OF_OPTIMISERS & given.keys():
        value = getattr(arguments, name)
        if value == defaults[name]:
            continue
        without = copy.copy(arguments)
        setattr(without, name, defaults[name])
        try:
            same = Trainer.get_optimizer_cls_and_kwargs(without, model)[1]
        except Exception:  # the optimiser needs the setting
            continue
        if same == Trainer.get_optimizer_cls_and_kwargs(arguments, model)[1]:
            raise ColdstillError(
                f"{place}: {name} = {value!r} would change nothing: the optimiser {optimiser!r} "
                "does not read it; remove it"
            )
