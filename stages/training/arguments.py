"""A recipe's `train` table as `transformers.TrainingArguments`.

Each of their settings is honoured by the training loop, decided by a key of the recipe, or without
effect. Settings of the last two kinds are refused, so that every accepted setting has an effect.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from ...data.errors import ColdstillError
from ..config import sequences_in
from ..libraries import asking
from ..ranks import world_size
from .feed import StepShape

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping
    from pathlib import Path

    from ..config import TrainConfig

HONOURED = {
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha", "tf32", "full_determinism", "torch_empty_cache_steps", "use_cpu",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
    "save_strategy", "save_total_limit",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "fsdp", "fsdp_config", "deepspeed",
}  # fmt: skip
"""Settings that the loop passes to the Trainer or implements."""

RECIPE_KEYS = {
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "per_device_train_batch_size": "train.batch_tokens and train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.gradient_clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "torch_compile": "train.compile",
    "torch_compile_backend": "train.compile",
    "torch_compile_mode": "train.compile",
    "logging_strategy": "train.log_every",
    "logging_steps": "train.log_every",
    "logging_first_step": "train.log_every",
    "save_steps": "train.checkpoint_every",
    "seed": "train.seed",
    "data_seed": "train.seed",
}
"""Settings that a key of the recipe decides, with that key."""

NO_EFFECT = {
    name: reason
    for reason, names in {
        "the loss is the recipe's objective, computed with its own output head": (
            "label_smoothing_factor", "use_liger_kernel", "liger_kernel_config", "label_names",
        ),
        "the loss is always averaged over all processes": ("average_tokens_across_devices",),
        "training never uses a cache": ("use_cache",),
        "a NaN or infinite loss stops the training": ("logging_nan_inf_filter",),
        "batches are made of whole sequences, by the recipe's keys": (
            "auto_find_batch_size", "dataloader_drop_last", "accelerator_config",
        ),
        "a recipe cannot hold one": ("parallelism_config",),
        "the order of sequences is the store's, a function of the seed": (
            "dataloader_in_order", "train_sampling_strategy", "length_column_name",
            "remove_unused_columns", "ignore_data_skip",
        ),
        "a training reads its store once, with the same workers": (
            "dataloader_persistent_workers",
        ),
        "nothing is evaluated while training; coldstill evaluate does it afterwards": (
            "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
            "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
            "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics",
            "batch_eval_metrics", "do_train", "do_eval", "do_predict", "load_best_model_at_end",
            "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval",
        ),
        "nothing is uploaded; upload what coldstill export writes": (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
            "hub_always_push", "hub_revision",
        ),
        "the first process saves checkpoints, always with the state to resume from": (
            "output_dir", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
            "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
        ),
        "coldstill prints its own lines and progress": (
            "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm",
            "include_num_input_tokens_seen", "skip_memory_metrics", "debug",
        ),
        "torchrun sets the rank of a process": ("local_rank",),
    }.items()
    for name in names
}  # fmt: skip
"""Settings without effect, with the reason."""


def expect_honoured(given: Mapping[str, Any], where: str) -> None:
    """Refuse a setting without effect.

    where  the stage or the recipe's table, for messages
    """
    place = f"{where}: train.trainer"
    for name in given:
        if name in HONOURED:
            continue
        if name in RECIPE_KEYS:
            raise ColdstillError(
                f"{place}: {name!r} follows from the keys of train itself; set {RECIPE_KEYS[name]}"
            )
        if name in NO_EFFECT:
            raise ColdstillError(
                f"{place}: {name!r} would change nothing: {NO_EFFECT[name]}; remove it"
            )
        known = [*HONOURED, *RECIPE_KEYS, *NO_EFFECT]
        near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
        guess = f"did you mean {near[0]!r}?" if near else "remove it"
        raise ColdstillError(f"{place}: transformers has no training argument {name!r}; {guess}")


ADVICE = "correct it, or remove it"
_STRATEGIES = {"no", "steps"}
"""The Trainer treats the whole training as one epoch, so 'epoch' would only save at its end."""


def step_shape(config: TrainConfig, sequence_length: int, stage: str) -> StepShape:
    """How a step is divided among processes and forward passes.

    Raises
        ColdstillError: the numbers do not divide
    """
    batch = sequences_in(config.batch_tokens, sequence_length)
    world = world_size()
    micro = batch // world
    if config.micro_batch_tokens is not None:
        micro = min(micro, sequences_in(config.micro_batch_tokens, sequence_length))
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
    """Copies of the settings, since the Trainer changes the tables that it gets."""
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
