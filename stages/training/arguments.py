"""A recipe's `train` table as `transformers.TrainingArguments`."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from ...data.errors import ColdstillError
from ..libraries import asking
from ..ranks import world_size
from .feed import StepShape
from .trainer_keys import expect_honoured

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping
    from pathlib import Path

    from ..config import TrainConfig

ADVICE = "correct it, or remove it"
_STRATEGIES = {"no", "steps"}
"""The Trainer treats the whole training as one epoch, so 'epoch' would only save at its end."""


def sequences_per_step(config: TrainConfig, sequence_length: int) -> int:
    """Sequences of an optimiser step."""
    return max(1, config.batch_tokens // sequence_length)


def step_shape(config: TrainConfig, sequence_length: int, stage: str) -> StepShape:
    """How a step is divided among processes and forward passes.

    Raises
        ColdstillError: the numbers do not divide
    """
    batch = sequences_per_step(config, sequence_length)
    world = world_size()
    micro = batch // world
    if config.micro_batch_tokens is not None:
        micro = min(micro, max(1, config.micro_batch_tokens // sequence_length))
    if micro == 0 or batch % (micro * world):
        raise ColdstillError(
            f"{stage}: a step of {batch} sequences cannot be shared out as {micro} per forward "
            f"pass on {world} processes; choose batch_tokens and micro_batch_tokens that divide"
        )
    return StepShape(processes=world, passes=batch // (micro * world), micro=micro)


def training_arguments(
    config: TrainConfig, shape: StepShape, seed: int, checkpoints: Path, stage: str
) -> TrainingArguments:
    """The arguments of the Trainer. Settings in `config.trainer` override the defaults.

    Raises
        ColdstillError: a setting that the Trainer refuses, or that a key of the recipe decides
    """
    settings = {**_settings(config, shape, checkpoints), "seed": seed}
    expect_honoured(config.trainer, stage)
    given = _typed(config.trainer, stage)
    if given.get("save_strategy", "steps") not in _STRATEGIES:
        raise ColdstillError(
            f"{stage}: train.trainer: save_strategy = {given['save_strategy']!r}, expected 'steps' "
            "or 'no'; train.checkpoint_every is the interval"
        )
    with warnings.catch_warnings(), taking(stage):
        # deprecations of arguments that still work
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(**(settings | given))
    if arguments.fsdp and arguments.fsdp_plugin_args["fsdp_version"] != 2:
        raise ColdstillError(
            f"{stage}: train.trainer: fsdp_config: version = "
            f"{arguments.fsdp_plugin_args['fsdp_version']}, expected 2; remove it"
        )
    return arguments


def taking(stage: str) -> contextlib.AbstractContextManager[None]:
    """Turn errors of the Trainer into errors of the recipe's `trainer` table."""
    place = f"{stage}: train.trainer"
    return asking("transformers", "train with these settings", where=place, remedy=ADVICE)


def _typed(given: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Copies of the settings, since the Trainer changes the tables that it gets.

    Raises
        ColdstillError: a value of a wrong type, which the Trainer would accept and fail on later
    """
    types: dict[str, Any] = {
        field.name: field.type for field in dataclasses.fields(TrainingArguments)
    } | {"fsdp": bool | str | None}  # declared as str, but also a switch
    for name, value in given.items():
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"]
            raise ColdstillError(
                f"{stage}: train.trainer: {name} = {value!r}: {wanted[0].lower()}{wanted[1:]}"
            ) from error
    return copy.deepcopy(dict(given))


def _settings(config: TrainConfig, shape: StepShape, checkpoints: Path) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    constant = config.schedule == "constant"
    return {
        "output_dir": str(checkpoints),
        "max_steps": config.steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": shape.micro,
        "gradient_accumulation_steps": shape.passes,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if constant else config.schedule,
        "warmup_steps": round(config.warmup * config.steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.gradient_clip,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "logging_strategy": "steps",
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
        "save_only_model": False,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        # `StepBatches` decides the order, the part of each process and the resumption
        "dataloader_drop_last": False,
        "dataloader_in_order": True,
        "ignore_data_skip": True,
        "remove_unused_columns": False,
        # all weights take part in the loss; searching for others costs time in every step
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
