"""What of a recipe's `train` table the trainer is told, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.stages.training.loop import read_metrics
from small_runs import LENGTH
from small_trainings import train_small
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.reader import StoreReader


def test_figures_go_where_the_trainer_reports_to(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, float]] = []

    class Board(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append({"step": state.global_step, **logs})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    train_small(store, tmp_path, steps=2, trainer={"report_to": "tensorboard"})
    assert told[:2] == read_metrics(tmp_path)


def test_a_board_that_is_not_installed_is_refused_in_one_line(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ColdstillError, match=r"train\.trainer: .*[Tt]ensor[Bb]oard") as error:
        train_small(store, tmp_path / "new", steps=1, trainer={"report_to": "tensorboard"})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"save_strategy": "epoch"}, "save_strategy = 'epoch', expected 'steps' or 'no'"),
        ({"dataloader_drop_last": True}, "'dataloader_drop_last' follows from the keys of train"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config: version = 1, expected 2"),
        ({"fsdp": True}, "Using fsdp only works in distributed training"),
    ],
)
def test_settings_that_would_change_the_order_or_do_nothing_are_refused(
    trainer: dict[str, Any], told: str, store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError) as error:
        train_small(store, tmp_path / "new", steps=1, trainer=trainer)
    assert str(error.value).startswith(f"train-student test: train.trainer: {told}")
    assert not (tmp_path / "new").exists()


def test_settings_the_trainer_does_not_know_are_refused_in_one_line(
    store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError, match=r"train\.trainer: .*learning_speed") as error:
        train_small(store, tmp_path, steps=1, trainer={"learning_speed": 1})
    assert "\n" not in str(error.value)


def test_micro_batches_that_do_not_divide_a_step_are_refused(
    store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError, match=r"a step of 4 sequences cannot be shared out as 3"):
        train_small(store, tmp_path, steps=1, micro_batch_tokens=3 * LENGTH)
