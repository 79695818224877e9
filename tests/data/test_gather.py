"""Sequences collected for a new store: nothing is rounded twice, and distortions add up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import (
    StoreRows,
    block_of,
    columns_of,
    convert,
    sums_of,
)
from coldstill.data.maintenance.shrink import shrink, take
from coldstill.data.ragged import Ragged
from coldstill.data.store.commit import block_statistics, total
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import blocks_of, fitted
from oracles import (
    assert_same,
    assert_same_columns,
    everything,
    manifest_for,
    random_block,
    write_missing,
)

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.columns import Columns
    from coldstill.data.schema import Block
    from coldstill.data.store.manifest import Manifest

COUNT = 22
BLOCK = random_block(11, COUNT)  # six shards of two blocks; the last shard holds two sequences
OTHER = random_block(12, 7)
STORES = ["arrow", "zarr"]
CHOICES = [
    np.arange(COUNT),
    np.array([13]),
    np.arange(4, 8),  # a shard
    np.arange(2, 8),
    np.array([0, 1, 5, 6, 7, 8, 15, 20, 21]),
]
"""Rows of `BLOCK`."""


def make(root: Path, block: Block = BLOCK, *, store: str = "arrow", corpus: str = "3") -> str:
    """A store of the compact codec, with its measured error."""
    manifest = manifest_for(block, codec="compact", store=store)
    manifest = replace(manifest, corpus=replace(manifest.corpus, fingerprint=corpus * 64))
    write_missing(root, fitted(manifest, block), block)
    return str(root)


def assert_same_blocks(found: list[Columns], wanted: list[Columns]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other)
        assert_same_columns(one, other)
        assert sharing(one) == sharing(other)


def sharing(columns: Columns) -> list[list[str]]:
    """The lists that share one array of offsets."""
    groups: dict[int, list[str]] = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            groups.setdefault(id(column.offsets), []).append(name)
    return sorted(groups.values())


def encoded(manifest: Manifest, block: Block, size: int) -> list[Columns]:
    codec = manifest.make_codec("here")
    return [codec.encode(part) for part in blocks_of(block, size)]


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_columns_equal_those_of_a_capture(tmp_path: Path, store: str) -> None:
    reader = open_store(make(tmp_path, store=store))
    for rows in CHOICES:
        for size in (1, 3, 100):
            found = columns_of([StoreRows(reader, rows)], size, reader.manifest.make_codec("r"))
            assert_same_blocks(found, encoded(reader.manifest, BLOCK.take(rows), size))


@pytest.mark.slow
def test_columns_of_several_stores_are_joined_into_blocks(tmp_path: Path) -> None:
    one = open_store(make(tmp_path / "a"))
    other = open_store(make(tmp_path / "b", OTHER, store="zarr"))
    pieces = [
        StoreRows(one, np.arange(3, 9)),
        StoreRows(other, np.array([1, 4])),
        StoreRows(one, np.arange(2)),
    ]
    parts = [BLOCK.take(np.arange(3, 9)), OTHER.take(np.array([1, 4])), BLOCK.take(np.arange(2))]
    wanted = type(BLOCK).concatenate(parts)
    codec = one.manifest.make_codec("one")
    assert other.manifest.codec["frequent"] != one.manifest.codec["frequent"]
    assert_same_blocks(columns_of(pieces, 4, codec), encoded(one.manifest, wanted, 4))
    assert block_of(pieces).sequences.ids.tolist() == wanted.sequences.ids.tolist()


def sums(store: StoreReader, rows: Any) -> Any:
    pieces = [StoreRows(store, np.asarray(rows))]
    return sums_of(pieces, block_of(pieces))


def test_statistics_are_those_of_the_chosen_rows(tmp_path: Path) -> None:
    store, stored = open_store(make(tmp_path)), everything(tmp_path)
    assert sums(store, range(4, 8)) == store.commit(1).statistics
    assert sums(store, range(COUNT)) == store.statistics
    captured = block_statistics(BLOCK.take(np.arange(4, 8)), (0,), np.zeros(1))
    assert sums(store, range(4, 8)).loss == pytest.approx(captured.loss, abs=1e-12)
    own = [block_statistics(stored.take(np.array(r)), (0,), np.zeros(1)) for r in ([2, 3], [9])]
    found = sums(store, [2, 3, *range(4, 8), 9])  # a part of a shard has its own statistics
    wanted = total([own[0], store.commit(1).statistics, own[1]])
    assert found.loss == pytest.approx(wanted.loss, abs=1e-12)
    assert found.entropy_bins == wanted.entropy_bins
    assert found.correct == wanted.correct
    lengths = BLOCK.sequences.positions.lengths
    shares = [lengths[[2, 3]].sum() / lengths[0:4].sum(), 1.0, lengths[9] / lengths[8:12].sum()]
    costs = [store.commit(shard).statistics.distortion for shard in (0, 1, 2)]
    assert found.distortion == pytest.approx(float(np.dot(shares, costs)))
    assert found.distortion > 0


@pytest.mark.slow
def test_slices_do_not_round_again_and_merged_ones_have_the_distortion_of_the_whole(
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "a")
    whole = open_store(path)
    for number, rows in enumerate(CHOICES):
        once, twice = (f"{tmp_path}/{number}-{times}" for times in (1, 2))
        assert take(path, once, rows).error == whole.manifest.error
        assert take(once, twice, np.arange(len(rows))).error == whole.manifest.error
        assert_same(everything(twice), everything(path).take(rows))
        assert open_store(twice).statistics.distortion > 0
    parts = [f"{tmp_path}/{number}" for number in range(3)]
    for part, rows in zip(parts, np.split(np.arange(COUNT), [5, 12]), strict=True):
        take(path, part, rows)
    made = merge(parts, f"{tmp_path}/all", None, None)
    merged = open_store(tmp_path / "all")
    assert made.error == whole.manifest.error
    assert merged.statistics.distortion == pytest.approx(whole.statistics.distortion)
    assert_same(everything(tmp_path / "all"), everything(path))


def test_merging_other_codecs_adds_their_distortion(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", OTHER, corpus="5")
    convert(b, f"{tmp_path}/plain", "plain", None)
    made = merge([f"{tmp_path}/plain", a], f"{tmp_path}/all", None, None)
    cost = sum(open_store(path).statistics.distortion for path in (a, b))
    assert open_store(tmp_path / "all").statistics.distortion == pytest.approx(cost)
    errors = [open_store(path).manifest.error for path in (a, b)]
    assert made.error.measured == max(error.measured for error in errors) > 0
    assert made.error.maximum == errors[0].maximum


def test_a_shrunken_store_keeps_the_statistics_of_its_capture(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    shrink(path, f"{tmp_path}/b", 2, 1)
    old, new = open_store(path).statistics, open_store(tmp_path / "b").statistics
    for name in ("loss", "entropy", "separators", "separator_mass", "entropy_bins", "correct"):
        assert getattr(new, name) == getattr(old, name), name
    mass = np.exp(everything(path).targets.head_logprobs[:, :2].astype(np.float64)).sum()
    assert new.head_mass == pytest.approx(mass)
    assert sum(new.mass_bins) == sum(old.mass_bins)
    assert new.distortion > old.distortion
