"""From rows to what a step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.order import epoch_order
from coldstill.data.prepared import CorpusLayout
from coldstill.data.reader import open_store
from coldstill.data.schema import Capture
from coldstill.stages.feed import Collate, CorpusDataset, EpochSampler, StoreDataset, flat_positions
from oracles import manifest_for, random_block, write_missing
from small_runs import SmallCorpus, capture_store, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.reader import StoreReader

CAPTURE = Capture(head=3, tail=2, temperatures=(2.0,))


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    return capture_store(corpus, teacher_folder, tmp_path_factory.mktemp("run") / "logits", CAPTURE)


def test_labels_are_the_tokens_after_the_positions(store: StoreReader) -> None:
    """In the padded batch itself: at a position stands what is read, after it the label."""
    rows = StoreDataset(store).__getitems__([5, 0, 7, 2])
    batch = Collate("positions", torch.float32, CAPTURE)(rows)
    flat = batch["input_ids"].flatten()
    assert torch.equal(batch["labels"], flat[batch["positions"] + 1])
    assert not torch.equal(batch["labels"], flat[batch["positions"]])
    width = batch["input_ids"].shape[1]
    next_position = batch["position_ids"].flatten()[batch["positions"] + 1]
    assert (next_position == batch["position_ids"].flatten()[batch["positions"]] + 1).all()
    assert width == rows[0].tokens.lengths.max()
    assert len(batch["labels"]) == len(batch["head_ids"]) == len(batch["log_norm"])
    assert batch["tail_logprobs"].shape == (len(batch["labels"]), 2)


def test_a_batch_holds_the_targets_of_its_rows_in_their_order(store: StoreReader) -> None:
    dataset = StoreDataset(store)
    many = dataset.__getitems__([5, 0, 7])
    singles = [dataset[i] for i in (5, 0, 7)]
    assert many[1] is not None
    expected = np.concatenate([single[1].head_ids for single in singles if single[1] is not None])
    np.testing.assert_array_equal(many[1].head_ids, expected)
    np.testing.assert_array_equal(many[0].ids, [5, 0, 7])
    assert len(dataset) == len(store)


def test_rows_of_a_corpus_come_without_targets(corpus: SmallCorpus, store: StoreReader) -> None:
    dataset = CorpusDataset(CorpusLayout(corpus.folder).open("train"))
    sequences, targets = dataset.__getitems__([3, 1])
    assert targets is None
    assert len(dataset) == len(store)
    np.testing.assert_array_equal(sequences.hashes, store.read(np.array([3, 1])).sequences.hashes)
    np.testing.assert_array_equal(dataset[3][0].hashes, sequences.hashes[:1])
    batch = Collate("positions", torch.float32, None)((sequences, targets))
    assert torch.equal(batch["labels"], batch["input_ids"].flatten()[batch["positions"] + 1])


def test_positions_count_from_the_start_of_their_row(store: StoreReader) -> None:
    sequences = store.read(np.array([1, 2])).sequences
    found = flat_positions(sequences, 100).tolist()
    expected = [*sequences.positions[0].tolist(), *(100 + sequences.positions[1]).tolist()]
    assert found == expected


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    block = random_block(0, 23)
    manifest = manifest_for(block, shard_sequences=5, block_sequences=2)
    write_missing(tmp_path, manifest, block)
    sampler = EpochSampler(StoreDataset(open_store(tmp_path)), seed=4)
    assert len(sampler) == 23
    first = list(sampler)
    assert first == list(sampler) == epoch_order(4, 0, 23, 5, 2).tolist()
    sampler.set_epoch(1)
    assert list(sampler) == epoch_order(4, 1, 23, 5, 2).tolist() != first
    assert sorted(first) == list(range(23))
