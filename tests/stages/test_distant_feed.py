"""Workers of a data loader that read a distant store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.places.cache import CacheSettings
from coldstill.data.store.reader import open_store
from coldstill.stages.training.feed import StepBatches, StepShape, StoreDataset
from oracles import manifest_for, random_block, write_missing
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from pathlib import Path

    from distance import Distance

pytest_plugins = ("distance",)


def first(rows: Any) -> Any:
    """What the data loader sends: something that travels."""
    return rows[0].sequences.ids.tolist(), rows[0].targets.head_logprobs.tolist()


def batches(store: Any, workers: int) -> list[Any]:
    dataset = StoreDataset(store)
    loader = DataLoader(
        dataset,
        # two epochs and a bit: workers are forked while shards come ahead
        batch_sampler=StepBatches(dataset, 3, StepShape(processes=1, passes=1, micro=4), steps=20),
        num_workers=workers,
        collate_fn=first,
        multiprocessing_context="fork" if workers else None,
    )
    return list(loader)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_read_the_same_batches_and_share_what_is_fetched(
    s3: Distance, tmp_path: Path
) -> None:
    block = random_block(1, 36)
    manifest = manifest_for(block, shard_sequences=6, block_sequences=2)
    write_missing(tmp_path / "near", manifest, block)
    write_missing(f"{s3.url}/store", manifest, block)
    near = open_store(tmp_path / "near")
    limit = 2 * sum(commit.bytes for commit in near.commits())
    cache = CacheSettings(folder=s3.cache.place, bytes=limit)
    far = open_store(f"{s3.url}/store", cache=cache)
    torch.manual_seed(0)
    assert batches(far, 2) == batches(near, 0)
    assert s3.network.count(r"GET .*\.arrow") == manifest.shards
