from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.formats import STORES
from coldstill.data.order import epoch_order
from coldstill.data.schema import Block, Capture
from coldstill.data.store import writer
from coldstill.data.store.commit import ShardStatistics, block_statistics, shard_files
from coldstill.data.store.layout import sealed
from coldstill.data.store.reader import StoreReader, open_store
from oracles import (
    as_stored,
    assert_same,
    everything,
    manifest_for,
    random_block,
    write_missing,
)
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

KINDS = list(itertools.product(sorted(STORES), sorted(CODECS)))
SIZES = [(1, 1, 1), (10, 4, 3), (10, 5, 5), (7, 100, 2), (9, 2, 64)]
"""Sequences in all, in a shard, in a block: with short last ones and without."""
BLOCK = random_block(0, 10)


def make(root: Path, block: Block = BLOCK, **options: Any) -> StoreReader:
    write_missing(root, manifest_for(block, **options), block)
    return open_store(root)


def read_refusal(root: Path) -> str:
    return refusal(everything, root)


def read_or_none(root: Path, row: int) -> Block | None:
    try:
        return open_store(root).read(np.array([row]))
    except (ColdstillError, IndexError):
        return None


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))


@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_any_sequences_are_read_in_any_order(tmp_path: Path, store: str, codec: str) -> None:
    for number, (count, shard, size) in enumerate(SIZES):
        source = random_block(count, count)
        options = {"shard_sequences": shard, "block_sequences": size}
        reader = make(tmp_path / str(number), source, store=store, codec=codec, **options)
        expected = [as_stored(source.take(np.array([row])), codec) for row in range(count)]
        random = np.random.default_rng(0)
        requests = [np.arange(count), np.arange(count)[::-1], random.integers(0, count, 3 * count)]
        for rows in requests:
            assert_same(reader.read(rows), Block.concatenate([expected[row] for row in rows]))
    for head, tail in ((0, 2), (2, 0), (0, 0)):
        source = random_block(3, 6, Capture(head=head, tail=tail))
        reader = make(tmp_path / f"{head}-{tail}", source, store=store, codec=codec)
        parts = [as_stored(source.take(rows), codec) for rows in (np.arange(3), np.arange(3, 6))]
        assert_same(reader.read(np.arange(6)), Block.concatenate(parts))


def test_batches_visit_every_sequence_once(tmp_path: Path) -> None:
    reader = make(tmp_path)
    orders = []
    for seed, epoch in ((None, 0), (5, 0), (5, 1)):
        order = np.arange(10) if seed is None else epoch_order(seed, epoch, 10, 4, 3)
        orders.append(tuple(order))
        for size in (1, 3, 4, 10, 99):
            batches = list(reader.batches(size, seed=seed, epoch=epoch))
            assert all(len(batch) == size for batch in batches[:-1])
            assert_same(Block.concatenate(batches), BLOCK.take(order))
    assert len(set(orders)) == 3


def test_size_and_statistics_are_known_without_reading_data(tmp_path: Path) -> None:
    reader = make(tmp_path)
    assert len(reader) == 10
    commits = list(reader.commits())
    shutil.rmtree(tmp_path / "shards")  # one pass over the records is enough
    assert reader.positions == len(BLOCK.targets)
    totals = reader.totals
    assert (totals.sequences, totals.positions) == (10, len(BLOCK.targets))
    assert totals.tokens == len(BLOCK.sequences.tokens.values)
    assert totals.documents == len(BLOCK.sequences.document_ids.values)
    assert totals.shard_bytes == [commit.bytes for commit in commits]
    assert totals.bytes == sum(totals.shard_bytes) > 0
    total = block_statistics(BLOCK, (0,), np.zeros(len(BLOCK.targets)))
    for f in fields(ShardStatistics):
        assert getattr(reader.statistics, f.name) == pytest.approx(getattr(total, f.name)), f.name


def test_a_store_may_be_moved_and_contain_other_files(tmp_path: Path) -> None:
    make(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    for name in ("notes.json", "1.json", "99999.json", ".unfinished-1-00000.json", "00000.txt"):
        (tmp_path / "there" / "shards" / name).write_text("not ours")
    assert_same(open_store(str(tmp_path / "there")).read(np.arange(10)), BLOCK)


def test_an_index_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    reader = make(tmp_path)
    for rows in ([], [-1], [10], [0, 99]):
        with pytest.raises(IndexError):
            reader.read(np.array(rows, dtype=np.int64))
    for wrong in ([0.5], 5, [[0]], ["a"]):
        with pytest.raises(IndexError, match="expected a list of whole numbers"):
            reader.read(np.array(wrong))


def test_a_missing_store_record_or_shard_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert read_refusal(nowhere).startswith(f"{nowhere}: no manifest.json there")
    make(tmp_path)
    path = tmp_path / "shards" / "00001.arrow"
    path.rename(tmp_path / "aside")
    assert read_refusal(tmp_path).startswith(f"{path}: damaged: missing")
    (tmp_path / "aside").rename(path)
    path.with_suffix(".json").unlink()
    expected = "incomplete, 2 of 3 shards; finish it with coldstill teacher-logits"
    assert read_refusal(tmp_path) == f"{tmp_path}: {expected}"


def test_a_commit_record_that_does_not_describe_its_shard_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    record = tmp_path / "shards" / "00001.json"
    whole, shard = record.read_text(), record.with_suffix(".arrow")
    file = json.loads(whole)["files"][0]
    changes: list[tuple[dict[str, Any], Path]] = [
        *(({name: value}, record) for name, value in (("shard", 0), ("sequences", 3))),
        ({"sequences": 5}, record),
        *(({"files": [file | {"bytes": size}]}, shard) for size in (1, 2**60)),
        ({"files": [file | {"sha256": "0" * 64}]}, shard),
        ({"files": [file, file | {"name": "more"}]}, shard / "more"),
    ]
    for change, named in changes:
        edit(record, change)
        assert read_refusal(tmp_path).startswith(f"{named}: damaged: "), change
        record.write_text(whole)


def test_a_wrong_manifest_never_gives_wrong_data(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    changes: dict[str, list[Any]] = {
        "sequences": [10**15, 11, 3],
        "shard_sequences": [3, 5, 2**31 - 1],
        "block_sequences": [1, 2, 4, 2**31 - 1],
        "capture": [{"head": 5}, {"head": -1}, {"tail": 10**30}, {"temperatures": [0.5]}],
        "codec": [{"name": "zip"}],
        "store": [{"name": "zip"}],
        "version": [1],
    }
    for field, value in ((name, value) for name in changes for value in changes[name]):
        is_part = isinstance(value, dict)
        edit(path, {field: json.loads(whole)[field] | value if is_part else value})
        assert str(tmp_path) in read_refusal(tmp_path)
        for row in range(10):  # nor may a part of it look right
            found = read_or_none(tmp_path, row)
            if found is not None:
                assert_same(found, BLOCK.take(np.array([row])))
        path.write_text(whole)


def test_tokens_that_do_not_match_their_hash_are_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "check_hashes", lambda sequences: None)  # it would refuse them
    hashes = BLOCK.sequences.hashes.copy()
    hashes[5] += np.uint64(1)
    make(tmp_path, replace(BLOCK, sequences=replace(BLOCK.sequences, hashes=hashes)))
    store = open_store(tmp_path)
    store.read(np.array([3, 7]))  # the blocks beside it are as good as ever
    path = tmp_path / "shards" / "00001.arrow"
    expected = f"{path}: block 0: sequence 5 is not what was written"
    assert refusal(store.read, np.array([5])).startswith(expected)


def test_a_shard_that_lacks_a_column_names_it(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "shards" / "00000.arrow"
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    for name in ("token_ids", "positions", "sequence_hash", "head_ids", "log_tail", "entropy"):
        kept = table.drop_columns([name])
        path.unlink()  # the old file may still be mapped
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, kept.schema) as writer:
            writer.write_table(kept)
        # the record agrees, so only the content is wrong
        edit(path.with_suffix(".json"), {"files": [asdict(file) for file in shard_files(path)]})
        message = read_refusal(tmp_path)
        assert message.startswith(f"{path}: block 0: ")
        assert name in message
