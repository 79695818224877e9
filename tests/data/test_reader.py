from __future__ import annotations

import itertools
import json
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.formats import STORES
from coldstill.data.order import epoch_order
from coldstill.data.schema import Block, Capture, Targets
from coldstill.data.store.commit import ShardStatistics, block_statistics, shard_files
from coldstill.data.store.layout import sealed
from coldstill.data.store.reader import StoreReader, open_store
from oracles import (
    FULL,
    VOCABULARY,
    assert_same,
    everything,
    manifest_for,
    random_block,
    write_missing,
)

if TYPE_CHECKING:
    from pathlib import Path

KINDS = list(itertools.product(sorted(STORES), sorted(CODECS)))
SIZES = [(1, 1, 1), (10, 4, 3), (10, 5, 5), (7, 100, 2), (9, 2, 64)]
"""Sequences in all, in a shard, in a block: with short last ones and without."""
BLOCK = random_block(0, 10)


def make(root: Path, block: Block = BLOCK, **options: Any) -> StoreReader:
    write_missing(root, manifest_for(block, **options), block)
    return open_store(root)


def as_stored(block: Block, codec: str) -> Block:
    """What is left of a block after its codec; the codec's own tests bound the difference."""
    made = CODECS[codec].fitting(vocabulary=VOCABULARY, capture=block.capture)
    return made.decode(made.encode(block), block.capture)


def refusal(root: Path) -> str:
    with pytest.raises(ColdstillError) as caught:
        everything(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_or_none(root: Path, row: int) -> Block | None:
    try:
        return open_store(root).read(np.array([row]))
    except (ColdstillError, IndexError):
        return None


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))


def recommit(root: Path, shard: int) -> None:
    """Make the record of a changed shard agree with it, so that only its content is wrong."""
    path = root / "shards" / f"0000{shard}.arrow"
    edit(path.with_suffix(".json"), {"files": [asdict(file) for file in shard_files(path)]})


@pytest.mark.parametrize(("store", "codec"), KINDS)
@pytest.mark.parametrize(("count", "shard", "block"), SIZES)
def test_any_sequences_are_read_in_any_order(
    tmp_path: Path, store: str, codec: str, count: int, shard: int, block: int
) -> None:
    source = random_block(count, count)
    options = {"shard_sequences": shard, "block_sequences": block, "store": store, "codec": codec}
    reader = make(tmp_path, source, **options)
    expected = [as_stored(source.take(np.array([row])), codec) for row in range(count)]
    random = np.random.default_rng(0)
    requests = [np.arange(count), np.arange(count)[::-1], random.integers(0, count, 3 * count)]
    for rows in requests:
        assert_same(reader.read(rows), Block.concatenate([expected[row] for row in rows]))


@pytest.mark.parametrize(("store", "codec"), KINDS)
@pytest.mark.parametrize(
    "capture",
    [Capture(head=0, tail=2), Capture(head=2, tail=0), Capture(head=0, tail=0), FULL],
    ids=["no head", "no tail", "neither", "everything"],
)
def test_every_capture_is_read_as_written(
    tmp_path: Path, store: str, codec: str, capture: Capture
) -> None:
    source = random_block(3, 6, capture)
    reader = make(tmp_path, source, store=store, codec=codec, shard_sequences=6, block_sequences=6)
    assert_same(reader.read(np.arange(6)), as_stored(source, codec))


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
@pytest.mark.parametrize(("seed", "epoch"), [(None, 0), (5, 0), (5, 1)])
def test_batches_visit_every_sequence_once(
    tmp_path: Path, size: int, seed: int | None, epoch: int
) -> None:
    batches = list(make(tmp_path).batches(size, seed=seed, epoch=epoch))
    assert all(len(batch) == size for batch in batches[:-1])
    order = np.arange(10) if seed is None else epoch_order(seed, epoch, 10, 4, 3)
    assert_same(Block.concatenate(batches), BLOCK.take(order))
    if seed is not None:
        assert order.tolist() != list(range(10))


def test_size_and_statistics_are_known_without_reading_data(tmp_path: Path) -> None:
    reader = make(tmp_path)
    assert len(reader) == 10
    assert reader.positions == len(BLOCK.targets)
    total = block_statistics(BLOCK, (0,), np.zeros(len(BLOCK.targets)))
    for f in fields(ShardStatistics):
        assert getattr(reader.statistics, f.name) == pytest.approx(getattr(total, f.name)), f.name


def test_a_store_may_be_moved_and_contain_other_files(tmp_path: Path) -> None:
    make(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    for name in ("notes.json", "1.json", "99999.json", ".unfinished-1-00000.json", "00000.txt"):
        (tmp_path / "there" / "shards" / name).write_text("not ours")
    assert_same(open_store(str(tmp_path / "there")).read(np.arange(10)), BLOCK)


@pytest.mark.parametrize("rows", [[], [-1], [10], [0, 99]])
def test_an_index_out_of_range_is_an_index_error(tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError):
        make(tmp_path).read(np.array(rows, dtype=np.int64))


def test_a_missing_store_record_or_shard_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere).startswith(f"{nowhere}: no manifest.json there")
    make(tmp_path)
    path = tmp_path / "shards" / "00001.arrow"
    path.rename(tmp_path / "aside")
    assert refusal(tmp_path).startswith(f"{path}: damaged: missing")
    (tmp_path / "aside").rename(path)
    path.with_suffix(".json").unlink()
    expected = "incomplete, 2 of 3 shards; finish it with coldstill teacher-logits"
    assert refusal(tmp_path) == f"{tmp_path}: {expected}"


def test_a_shard_that_is_cut_or_has_a_flipped_bit_is_named(tmp_path: Path) -> None:
    """Before any of its data is used; the other shards can still be read."""
    make(tmp_path)
    path = tmp_path / "shards" / "00001.arrow"
    whole = path.read_bytes()
    damaged = {whole[:size]: f"damaged: {len(whole[:size])} bytes, its" for size in (0, 100, -1)}
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        flipped = bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
        damaged[flipped] = "damaged: its checksum is not the one"
    for content, told in damaged.items():
        path.write_bytes(content)
        store = open_store(tmp_path)
        store.read(np.array([0, 8]))
        with pytest.raises(ColdstillError) as caught:
            store.read(np.array([4]))
        assert str(caught.value).startswith(f"{path}: {told}")
        assert "coldstill store repair" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_commit_record_that_does_not_describe_its_shard_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    record = tmp_path / "shards" / "00001.json"
    whole, shard = record.read_text(), record.with_suffix(".arrow")
    file = json.loads(whole)["files"][0]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"shard": 0}, f"{record}: damaged: "),
        ({"sequences": 3}, f"{record}: damaged: "),
        ({"sequences": 5}, f"{record}: damaged: "),
        ({"files": [file | {"bytes": 1}]}, f"{shard}: damaged: "),
        ({"files": [file | {"bytes": 2**60}]}, f"{shard}: damaged: "),
        ({"files": [file | {"sha256": "0" * 64}]}, f"{shard}: damaged: "),
        ({"files": [file, file | {"name": "more"}]}, f"{shard}/more: damaged: "),
    ]
    for change, told in changes:
        edit(record, change)
        assert refusal(tmp_path).startswith(told), change
        record.write_text(whole)


def test_two_shards_that_changed_places_are_found(tmp_path: Path) -> None:
    make(tmp_path)
    shards = tmp_path / "shards"
    for suffix in (".arrow", ".json"):
        (shards / f"00000{suffix}").rename(shards / "aside")
        (shards / f"00001{suffix}").rename(shards / f"00000{suffix}")
        (shards / "aside").rename(shards / f"00001{suffix}")
    assert refusal(tmp_path).startswith(f"{shards / '00000.json'}: damaged: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequences", 10**15),
        ("sequences", 11),
        ("sequences", 3),
        ("shard_sequences", 3),
        ("shard_sequences", 5),
        ("shard_sequences", 2**31 - 1),
        ("block_sequences", 1),
        ("block_sequences", 2),
        ("block_sequences", 4),
        ("block_sequences", 2**31 - 1),
        ("capture", {"head": 5}),
        ("capture", {"head": -1}),
        ("capture", {"tail": 10**30}),
        ("capture", {"temperatures": [0.5]}),
        ("codec", {"name": "zip"}),
        ("store", {"name": "zip"}),
        ("version", 1),
    ],
)
def test_a_wrong_manifest_never_gives_wrong_data(tmp_path: Path, field: str, value: Any) -> None:
    make(tmp_path)
    if isinstance(value, dict):
        value = json.loads((tmp_path / "manifest.json").read_text())[field] | value
    edit(tmp_path / "manifest.json", {field: value})
    assert str(tmp_path) in refusal(tmp_path)
    for row in range(10):  # nor may a part of it look right
        found = read_or_none(tmp_path, row)
        if found is not None:
            assert_same(found, BLOCK.take(np.array([row])))


def test_tokens_that_do_not_match_their_hash_are_never_trained_on(tmp_path: Path) -> None:
    hashes = BLOCK.sequences.hashes.copy()
    hashes[5] += np.uint64(1)
    make(tmp_path, replace(BLOCK, sequences=replace(BLOCK.sequences, hashes=hashes)))
    store = open_store(tmp_path)
    store.read(np.array([3, 7]))  # the blocks beside it are as good as ever
    with pytest.raises(ColdstillError) as caught:
        store.read(np.array([5]))
    path = tmp_path / "shards" / "00001.arrow"
    assert str(caught.value).startswith(f"{path}: block 0: sequence 5 is not what was written")


def test_a_shard_that_lacks_a_column_names_it(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "shards" / "00000.arrow"
    for name in ("token_ids", "positions", "sequence_hash", "head_ids", "log_tail", "entropy"):
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        with pa.OSFile(str(path), "wb") as sink:
            kept = table.drop_columns([name])
            with pa.ipc.new_file(sink, kept.schema) as writer:
                writer.write_table(kept)
        recommit(tmp_path, 0)
        text = refusal(tmp_path)
        assert text.startswith(f"{path}: block 0: ")
        assert name in text
        for leftover in tmp_path.rglob("*0000*"):
            leftover.unlink()
        make(tmp_path)


def plain_rows(block: Block) -> list[dict[str, Any]]:
    """What any reader should find, one row a sequence."""
    rows: list[dict[str, Any]] = []
    place = 0
    sequences, targets = block.sequences, block.targets
    for row in range(len(block)):
        size = len(sequences.positions[row])
        part = slice(place, place + size)
        place += size
        rows.append(
            {
                "sequence_id": int(sequences.ids[row]),
                "sequence_hash": int(sequences.hashes[row]),
                "token_ids": sequences.tokens[row].tolist(),
                "document_starts": sequences.document_starts[row].tolist(),
                "document_ids": sequences.document_ids[row].tolist(),
                "positions": sequences.positions[row].tolist(),
            }
            | {f.name: getattr(targets, f.name)[part].tolist() for f in fields(Targets)}
        )
    return rows


def test_a_plain_store_is_read_by_pyarrow_alone(tmp_path: Path) -> None:
    make(tmp_path, codec="plain", store="arrow")
    rows = []
    for path in sorted(tmp_path.glob("shards/*.arrow")):
        with pa.memory_map(str(path)) as source:
            rows += pa.ipc.open_file(source).read_all().to_pylist()
    assert rows == plain_rows(BLOCK)


def test_a_plain_store_is_read_by_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    make(tmp_path / "store", codec="plain", store="arrow")
    files = [str(path) for path in sorted(tmp_path.glob("store/shards/*.arrow"))]
    datasets.disable_progress_bars()
    found = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found.to_list() == plain_rows(BLOCK)
