"""Training of a small model from a small store in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from coldstill.data.errors import DamageError
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.models.building import build_model
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.report import Reporter, silent
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.loop import TrainingJob, train
from coldstill.stages.training.objective import terms_of
from conftest import VOCABULARY
from small_runs import CLOCKS, LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.training.batch import Rows

Weights = dict[str, "torch.Tensor"]


def small_job(
    store: StoreReader,
    folder: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    objective: ObjectiveConfig | None = None,
    **settings: Any,
) -> TrainingJob:
    """A job with a new model and four sequences a step; `settings` go to `TrainConfig`."""
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), "store")
    architecture = ArchitectureConfig(family=family, layers=1, hidden=32, heads=2, tied=tied)
    model = build_model(architecture, tokenizer, LENGTH, 3, "test")
    capture = store.manifest.capture
    defaults: dict[str, Any] = {"batch_tokens": 4 * LENGTH, "log_every": 1}
    return TrainingJob(
        stage="train-student test",
        head=connect_head(model, VOCABULARY),
        dataset=StoreDataset(store),
        isolation="positions",
        capture=capture,
        terms=terms_of(objective or ObjectiveConfig(cross_entropy=0.5), capture, "test"),
        config=TrainConfig(**(defaults | settings)),
        sequence_length=LENGTH,
        seed=11,
        folder=folder,
    )


def train_small(
    store: StoreReader, folder: Path, report: Reporter = silent, **settings: Any
) -> Weights:
    """Train the model of a `small_job`; returns its weights."""
    job = small_job(store, folder, **settings)
    train(job, report)
    return weights_of(job)


def weights_of(job: TrainingJob) -> Weights:
    """Copies of the model's weights."""
    return {name: weight.detach().clone() for name, weight in job.head.model.named_parameters()}


def lines(folder: Path) -> list[dict[str, float]]:
    """The metrics without those that depend on the clock."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]


def spoiled(poison: int | None = None, damaged: int | None = None) -> Callable[..., Rows]:
    """`StoreDataset.__getitems__` with one sequence of NaN targets, or one that cannot be read."""
    read = StoreDataset.__getitems__

    def spoil(dataset: StoreDataset, indices: list[int]) -> Rows:
        if damaged in indices:
            raise DamageError("a damaged shard")
        (block,) = read(dataset, indices)
        if poison in indices:
            nan = np.full_like(block.targets.head_logprobs, np.nan)
            block = replace(block, targets=replace(block.targets, head_logprobs=nan))
        return (block,)

    return spoil


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
