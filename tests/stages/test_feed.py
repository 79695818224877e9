"""From rows to the batches of a step, from near and distant stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.order import epoch_order
from coldstill.data.places.cache import CacheSettings
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Capture
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.stages.models.inputs import flat_positions
from coldstill.stages.training.batch import collate
from coldstill.stages.training.feed import (
    CorpusDataset,
    MixedDataset,
    OrderPosition,
    StepBatches,
    StepShape,
    StoreDataset,
    Trainable,
)
from oracles import manifest_for, random_block, write_missing
from small_runs import SmallCorpus, capture_store
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from pathlib import Path

    from distance import Distance


CAPTURE = Capture(head=3, tail=2, temperatures=(2.0,))


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    return capture_store(corpus, teacher_folder, tmp_path_factory.mktemp("run") / "logits", CAPTURE)


@pytest.mark.slow
def test_labels_are_the_tokens_after_the_positions(store: StoreReader) -> None:
    """In the padded batch itself: at a position stands what is read, after it the label."""
    rows = StoreDataset(store).__getitems__([5, 0, 7, 2])
    batch = collate(rows)
    ids_BT, target = batch.inputs["input_ids"], batch.targets
    assert torch.equal(target.labels, ids_BT.flatten()[batch.positions + 1])
    assert not torch.equal(target.labels, ids_BT.flatten()[batch.positions])
    place_BT = batch.inputs["position_ids"].flatten()
    assert (place_BT[batch.positions + 1] == place_BT[batch.positions] + 1).all()
    assert ids_BT.shape[1] == rows[0].sequences.tokens.lengths.max()
    assert len(target) == len(target.head_ids) == len(target.log_norm)
    assert target.tail.logprobs is not None
    assert target.tail.logprobs.shape == target.tail.ids.shape == target.tail.counts.shape
    drawn = torch.zeros(len(target)).index_add(0, target.tail.rows(), target.tail.counts.float())
    assert (drawn == 2).all()


def test_a_batch_holds_the_targets_of_its_rows_in_their_order(store: StoreReader) -> None:
    dataset = StoreDataset(store)
    many, singles = dataset.__getitems__([5, 0, 7]), [dataset[i] for i in (5, 0, 7)]
    assert many[0].sequences.ids.tolist() == [5, 0, 7]
    expected = np.concatenate([single.targets.head_ids for (single,) in singles])
    np.testing.assert_array_equal(many[0].targets.head_ids, expected)
    for batch in (collate(many), collate(singles)):
        assert batch.sequence_ids == (5, 0, 7)
        np.testing.assert_array_equal(batch.targets.head_ids, expected)
    assert len(dataset) == len(store)


def test_rows_of_a_corpus_come_without_targets(corpus: SmallCorpus, store: StoreReader) -> None:
    dataset = CorpusDataset(CorpusLayout(corpus.folder).open("train"))
    rows = dataset.__getitems__([3, 1])
    hashes = rows[0].sequences.hashes
    assert len(dataset) == len(store)
    np.testing.assert_array_equal(hashes, store.read(np.array([3, 1])).sequences.hashes)
    np.testing.assert_array_equal(dataset[3][0].sequences.hashes, hashes[:1])
    batch = collate(rows)
    assert torch.equal(
        batch.targets.labels, batch.inputs["input_ids"].flatten()[batch.positions + 1]
    )
    assert batch.targets.head_ids.shape == (len(batch.positions), 0)
    assert len(batch.targets.tail.ids) == 0


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
    dataset: Trainable,
    shape: StepShape,
    steps: int,
    begin: tuple[int, OrderPosition] | None = None,
) -> list[list[int]]:
    """The sequences of each step, from what every process takes."""
    parts = []
    for rank in range(shape.processes):
        batches = StepBatches(dataset, 4, shape, rank=rank, steps=steps)
        if begin is not None:
            batches.resume(*begin)
        assert len(batches) == steps * shape.passes
        parts.append(list(batches))
        assert {len(batch) for batch in parts[-1]} <= {shape.micro}
    taken = range(0, len(parts[0]), shape.passes)
    return [
        [row for part in parts for batch in part[i : i + shape.passes] for row in batch]
        for i in taken
    ]


SHAPES = [(1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "passes", "micro"), SHAPES)
@pytest.mark.parametrize("sequences", [23, 24, 3])
def test_every_sequence_is_used_once_per_epoch_by_any_number_of_processes(
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


def test_two_integers_are_enough_to_resume(tmp_path: Path) -> None:
    dataset, shape = numbered(tmp_path, 23), StepShape(processes=1, passes=2, micro=2)
    straight = StepBatches(dataset, 4, shape, steps=15)
    whole = steps_of(dataset, shape, 15)
    for step in range(16):
        place = straight.position_after(step)
        assert (place.epoch, place.sequences) == divmod(4 * step, 23)
        # by other processes than before
        other = StepShape(processes=2, passes=1, micro=2)
        assert steps_of(dataset, other, 15, (step, place)) == whole[step:]
        again = StepBatches(dataset, 4, shape, steps=15)
        again.resume(step, place)
        assert again.position_after(15) == straight.position_after(15)


def slowly_mixed(
    seed: int, sizes: tuple[int, int], share: float, count: int
) -> list[tuple[bool, int]]:
    """The first items of a mixture, one at a time: whether one is further text, and its index."""
    sides = [
        [row for epoch in range(40) for row in epoch_order(seed, epoch, size, 5, 2).tolist()]
        for size in sizes
    ]
    found: list[tuple[bool, int]] = []
    for place in range(count):
        is_further = int((place + 1) * share) > int(place * share)
        found.append((is_further, sides[is_further].pop(0)))
    return found


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_mixture_takes_its_share_of_each_side_and_resumes(tmp_path: Path, share: float) -> None:
    stores = []
    for name, sequences in (("old", 13), ("new", 4), ("newer", 3)):
        block = random_block(sequences, sequences)
        write_missing(
            tmp_path / name, manifest_for(block, shard_sequences=5, block_sequences=2), block
        )
        stores.append(open_store(tmp_path / name))
    dataset = MixedDataset(stores[0], stores[1:], share)
    assert len(dataset) == 20
    expected = [row + 13 * is_further for is_further, row in slowly_mixed(4, (13, 7), share, 60)]
    order = np.concatenate([dataset.order(4, epoch) for epoch in range(3)]).tolist()
    assert order == expected
    for seen in (0, 1, 7, 20):
        assert dataset.order(4, 1, seen).tolist() == expected[20 + seen : 40]
    shape = StepShape(processes=2, passes=1, micro=2)
    assert [row for step in steps_of(dataset, shape, 15) for row in step] == expected
    [block] = dataset.__getitems__([14, 3, 19, 13])
    rows = [(0, 3), (1, 1), (1, 0), (2, 2)]  # those of one store stay together
    wanted = [stores[number].read(np.array([row])).sequences.hashes[0] for number, row in rows]
    assert block.sequences.hashes.tolist() == wanted
    assert len(block.targets) == len(block.sequences.positions.values)


def test_a_mixture_without_further_text_is_refused(tmp_path: Path) -> None:
    numbered(tmp_path, 4)
    store = open_store(tmp_path)
    assert MixedDataset(store, (), 0.0).order(0, 0).tolist() == store.order(0, 0).tolist()
    with pytest.raises(ColdstillError, match="no further sequences to mix in"):
        MixedDataset(store, (), 0.5)


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


@pytest.mark.slow
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
