"""Every setting of `transformers.TrainingArguments`, and whether a recipe may set it.

The training loop honours a setting, a key of the recipe decides it, or it has no effect. Settings
of the last two kinds are refused, so that every accepted setting has an effect.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Mapping

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

_NO_EVALUATION = "nothing is evaluated while training; coldstill evaluate does it afterwards"
_NO_UPLOAD = "nothing is uploaded; upload what coldstill export writes"
_OWN_ORDER = "the order of sequences is the store's, a function of the seed"
_OWN_BATCHES = "batches are made of whole sequences, by the recipe's keys"
_OWN_CHECKPOINTS = "the first process saves checkpoints, always with the state to resume from"
_OWN_LOSS = "the loss is the recipe's objective, computed with its own output head"
_OWN_LINES = "coldstill prints its own lines and progress"
NO_EFFECT = {
    **dict.fromkeys(
        ("label_smoothing_factor", "use_liger_kernel", "liger_kernel_config", "label_names"),
        _OWN_LOSS,
    ),
    "average_tokens_across_devices": "the loss is always averaged over all processes",
    "use_cache": "training never uses a cache",
    "logging_nan_inf_filter": "a NaN or infinite loss stops the training",
    "auto_find_batch_size": _OWN_BATCHES,
    "dataloader_drop_last": _OWN_BATCHES,
    "accelerator_config": _OWN_BATCHES,
    "parallelism_config": "a recipe cannot hold one",
    **dict.fromkeys(
        (
            "dataloader_in_order", "train_sampling_strategy", "length_column_name",
            "remove_unused_columns", "ignore_data_skip",
        ),
        _OWN_ORDER,
    ),
    "dataloader_persistent_workers": "a training reads its store once, with the same workers",
    **dict.fromkeys(
        (
            "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
            "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
            "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics",
            "batch_eval_metrics", "do_train", "do_eval", "do_predict", "load_best_model_at_end",
            "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval",
        ),
        _NO_EVALUATION,
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
            "hub_always_push", "hub_revision",
        ),
        _NO_UPLOAD,
    ),
    **dict.fromkeys(
        (
            "output_dir", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
            "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
        ),
        _OWN_CHECKPOINTS,
    ),
    **dict.fromkeys(
        (
            "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm",
            "include_num_input_tokens_seen", "skip_memory_metrics", "debug",
        ),
        _OWN_LINES,
    ),
    "local_rank": "torchrun sets the rank of a process",
}  # fmt: skip
"""Settings without effect, with the reason."""


def expect_honoured(given: Mapping[str, Any], where: str) -> None:
    """Refuse a setting without effect.

    where  the stage or the recipe's table, for messages

    Raises
        ColdstillError: the first such setting, with the recipe's key to set instead, the reason, or
            the nearest known setting
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
