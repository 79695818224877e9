"""From rows to what a step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.order import epoch_order
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Capture
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.stages.models.isolation import flat_positions
from coldstill.stages.training.feed import (
    Collate,
    CorpusDataset,
    Place,
    StepBatches,
    StepShape,
    StoreDataset,
)
from oracles import manifest_for, random_block, write_missing
from small_runs import SmallCorpus, capture_store, prepare

if TYPE_CHECKING:
    from pathlib import Path

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


def numbered(folder: Path, sequences: int) -> StoreDataset:
    """A store in three shards or more, of several blocks each."""
    block = random_block(0, sequences)
    manifest = manifest_for(block, shard_sequences=5, block_sequences=2)
    write_missing(folder, manifest, block)
    return StoreDataset(open_store(folder))


def steps_of(
    dataset: StoreDataset, shape: StepShape, steps: int, begin: tuple[int, Place] | None = None
) -> list[list[int]]:
    """The sequences of each step, from what every process takes."""
    parts = []
    for rank in range(shape.processes):
        batches = StepBatches(dataset, 4, shape, rank=rank, steps=steps)
        if begin is not None:
            batches.go_on(*begin)
        assert len(batches) == steps * shape.passes
        parts.append(list(batches))
        assert {len(batch) for batch in parts[-1]} <= {shape.micro}
    taken = range(0, len(parts[0]), shape.passes)
    return [
        [row for part in parts for batch in part[i : i + shape.passes] for row in batch]
        for i in taken
    ]


SHAPES = [(1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]


@pytest.mark.parametrize(("processes", "passes", "micro"), SHAPES)
@pytest.mark.parametrize("sequences", [23, 24, 3])
def test_every_sequence_is_taken_once_an_epoch_by_any_number_of_processes(
    sequences: int, processes: int, passes: int, micro: int, tmp_path: Path
) -> None:
    dataset = numbered(tmp_path, sequences)
    shape = StepShape(processes=processes, passes=passes, micro=micro)
    found = steps_of(dataset, shape, 15)
    assert {len(step) for step in found} == {4}
    order = np.concatenate([dataset.order(4, epoch) for epoch in range(20)]).tolist()
    assert [row for step in found for row in step] == order[:60]
    for first in range(0, 60 - sequences, sequences):
        epoch = order[first : first + sequences]
        assert sorted(epoch) == list(range(sequences))


def test_epochs_differ() -> None:
    assert epoch_order(4, 0, 23, 5, 2).tolist() != epoch_order(4, 1, 23, 5, 2).tolist()


def test_two_integers_say_where_to_go_on(tmp_path: Path) -> None:
    dataset, shape = numbered(tmp_path, 23), StepShape(processes=1, passes=2, micro=2)
    straight = StepBatches(dataset, 4, shape, steps=15)
    whole = steps_of(dataset, shape, 15)
    for step in range(16):
        place = straight.place_after(step)
        assert (place.epoch, place.sequences) == divmod(4 * step, 23)
        # by other processes than before
        other = StepShape(processes=2, passes=1, micro=2)
        assert steps_of(dataset, other, 15, (step, place)) == whole[step:]
        again = StepBatches(dataset, 4, shape, steps=15)
        again.go_on(step, place)
        assert again.place_after(15) == straight.place_after(15)


def test_an_epoch_reads_every_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a step takes its sequences from all over a window of shards."""
    dataset = numbered(tmp_path, 100)
    reads: list[tuple[int, int]] = []
    columns = StoreReader.columns

    def watched(store: StoreReader, shard: int, number: int) -> Any:
        reads.append((shard, number))
        return columns(store, shard, number)

    monkeypatch.setattr(StoreReader, "columns", watched)
    for batch in StepBatches(dataset, 4, StepShape(processes=1, passes=1, micro=4), steps=25):
        dataset.__getitems__(batch)
    assert len(reads) == len(set(reads)) == 20 * 3
