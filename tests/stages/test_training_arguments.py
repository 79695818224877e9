"""What of a recipe's `train` table the trainer is message, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import refused
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import TrainConfig
from coldstill.stages.training.arguments import (
    HONOURED,
    NO_EFFECT,
    RECIPE_KEYS,
    expect_honoured,
    training_arguments,
)
from coldstill.stages.training.feed import StepShape
from coldstill.stages.training.rehearsal import expect_trainable
from small_runs import LENGTH
from small_trainings import read_metrics, train_small
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader


@pytest.mark.slow
def test_metrics_are_reported_where_the_trainer_reports(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []

    class Board(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append({"step": state.global_step, **logs})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    train_small(store, tmp_path, steps=2, trainer={"report_to": "tensorboard"})
    assert logged[:2] == read_metrics(tmp_path)


def test_a_missing_reporting_package_is_refused_in_one_line(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ColdstillError, match=r"train\.trainer: .*[Tt]ensor[Bb]oard") as error:
        train_small(store, tmp_path / "new", steps=1, trainer={"report_to": "tensorboard"})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_settings_that_training_cannot_honour_are_refused_in_one_line(
    store: StoreReader, tmp_path: Path
) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"save_strategy": "epoch"}, "save_strategy = 'epoch', expected 'steps' or 'no'"),
        ({"dataloader_drop_last": True}, "'dataloader_drop_last' would change nothing: "),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config: version = 1, expected 2"),
        ({"fsdp": True}, "transformers cannot train with these settings: Using fsdp only works"),
        ({"learning_speed": 1}, "transformers has no training argument 'learning_speed'; "),
    ]
    for trainer, message in refused:
        with pytest.raises(ColdstillError) as error:
            train_small(store, tmp_path / "new", steps=1, trainer=trainer)
        assert str(error.value).startswith(f"train-student test: train.trainer: {message}")
        assert "\n" not in str(error.value)
    with pytest.raises(ColdstillError, match=r"a step of 4 sequences cannot be shared out as 3"):
        train_small(store, tmp_path / "new", steps=1, micro_batch_tokens=3 * LENGTH)
    assert not (tmp_path / "new").exists()


def test_every_setting_of_the_trainer_is_honoured_or_refused_with_a_reason() -> None:
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert sorted([*HONOURED, *RECIPE_KEYS, *NO_EFFECT]) == sorted(names)
    keys = {field.name for field in dataclasses.fields(TrainConfig)}
    for name, named in RECIPE_KEYS.items():
        assert {word.removeprefix("train.") for word in named.split(" and ")} <= keys, name


def test_a_setting_without_effect_is_refused_with_the_reason_or_the_nearest_name() -> None:
    for name, message in (RECIPE_KEYS | NO_EFFECT).items():
        with pytest.raises(ColdstillError) as error:
            expect_trainable(TrainConfig(steps=1, trainer={name: True}), "students.a")
        assert str(error.value).startswith(f"students.a: train.trainer: {name!r} ")
        assert message in str(error.value)
    with pytest.raises(ColdstillError, match="'adam_epsilo'; did you mean 'adam_epsilon'"):
        expect_honoured({"adam_epsilo": 0.5}, "teacher")


PROBES: dict[str, Any] = {
    "optim": "sgd",
    "adam_beta1": 0.1,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "lr_scheduler_kwargs": {"num_cycles": 3.0},
    "neftune_noise_alpha": 50.0,
}
"""Settings that change what is learned."""
OTHERS: dict[str, Any] = {
    "tf32": False,
    "torch_empty_cache_steps": 1,
    "use_cpu": True,
    "run_name": "a",
    "project": "b",
    "save_total_limit": 1,
    "save_strategy": "no",
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "ddp_bucket_cap_mb": 5,
    "ddp_timeout": 60,
    "ddp_static_graph": True,
    "ddp_broadcast_buffers": True,
    "ddp_find_unused_parameters": True,
    "optim_target_modules": ["q_proj"],
    "trackio_space_id": "c",
}
"""Settings that arrive at the trainer; what they change is elsewhere."""


@pytest.mark.slow
def test_settings_that_are_honoured_change_what_is_learned(
    store: StoreReader, tmp_path: Path
) -> None:
    assert PROBES.keys() <= HONOURED

    def learned(name: str, trainer: dict[str, Any]) -> torch.Tensor:
        weights = train_small(store, tmp_path / name, steps=3, warmup=0.0, trainer=trainer)
        return torch.cat([weight.flatten() for weight in weights.values()])

    plain = learned("plain", {})
    assert torch.equal(plain, learned("again", {}))
    for name, value in PROBES.items():
        assert not torch.equal(plain, learned(name, {name: value})), name


def test_settings_that_are_honoured_arrive_at_the_trainer(tmp_path: Path) -> None:
    assert OTHERS.keys() <= HONOURED
    shape = StepShape(processes=1, passes=1, micro=1)
    for name, value in OTHERS.items():
        config = TrainConfig(steps=1, trainer={name: value})
        arguments = training_arguments(config, shape, 0, tmp_path, "a")
        assert getattr(arguments, name) == value, name


OPTIMISERS = (
    "adamw_bnb_8bit", "paged_lion_8bit", "ademamix", "galore_adamw", "galore_adafactor_layerwise",
    "lomo", "adalomo", "apollo_adamw", "schedule_free_adamw", "schedule_free_radam", "grokadamw",
    "stable_adamw", "adamw_anyprecision", "adamw_torch_xla", "adamw_torch_npu_fused",
)  # fmt: skip
"""Optimisers whose packages are not installed."""


def test_an_optimiser_whose_package_is_missing_is_refused_before_training(
    store: StoreReader, tmp_path: Path
) -> None:
    for optimiser in OPTIMISERS:
        config = TrainConfig(steps=1, trainer={"optim": optimiser})
        line = refused(lambda config=config: expect_trainable(config, "students.a"))  # type: ignore[misc]
        assert line.startswith("students.a: train.trainer: transformers cannot ")
    line = refused(lambda: train_small(store, tmp_path / "new", trainer={"optim": "lomo"}, steps=1))
    assert line.startswith("train-student test: train.trainer: transformers cannot ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {"adam_beta1": "a lot"},
        {"adam_beta1": 5.0},
        {"optim": "adam"},
        {"optim_args": "amsgrad=True"},  # this optimiser ignores it
        {"optim_args": "no equals sign"},
        {"optim": "sgd", "optim_args": "momentum=fast"},
        {"optim": "sgd", "adam_beta1": 0.5},
        {"optim_target_modules": ["q_proj"]},  # this optimiser ignores them
        {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},  # its package is missing
        {"dataloader_num_workers": -1},
        {"dataloader_prefetch_factor": 2},  # without workers
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "bowl"},
        {"lr_scheduler_kwargs": {"laps": 3}},
        {"lr_scheduler_kwargs": 3},
        {"report_to": "wandb"},
        {"report_to": "boards"},
        {"dataloader_num_workers": 1.5},
        {"use_cpu": "yes"},
        {"deepspeed": "zero.json"},
    ],
    ids=str,
)
def test_a_value_that_the_trainer_cannot_use_is_refused_at_once(trainer: dict[str, Any]) -> None:
    line = refused(lambda: expect_trainable(TrainConfig(steps=2, trainer=trainer), "students.a"))
    assert line.startswith("students.a: train.trainer: ")
