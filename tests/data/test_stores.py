"""What every store promises; a new one inherits `StoreTests` and says how to damage a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import whole_file
from coldstill.data.ragged import Ragged
from coldstill.data.stores import STORES

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.columns import Columns


def random_columns(seed: int, count: int, longest: int = 4) -> Columns:
    random = np.random.default_rng(seed)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(random.integers(0, longest + 1, count), out=offsets[1:])
    total = int(offsets[-1])
    columns: Columns = {
        "int64": random.integers(-(2**60), 2**60, count),
        "uint64": random.integers(0, 2**64, count, dtype=np.uint64),
        "float64": random.normal(size=count),
        "list": Ragged(random.integers(0, 9, total).astype(np.int32), offsets),
        "bytes": Ragged(random.integers(0, 256, total).astype(np.uint8), offsets),
        "list of rows": Ragged(random.normal(size=(total, 3)).astype(np.float32), offsets),
        "list of one": Ragged(random.normal(size=(total, 1)).astype(np.float32), offsets),
    }
    return columns


def assert_same(found: Columns, wanted: Columns) -> None:
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        other: Any = found[name]
        if isinstance(column, Ragged):
            assert isinstance(other, Ragged), name
            assert np.array_equal(other.offsets, column.offsets), name
            assert other.offsets.dtype == np.int64, name
            column, other = column.values, other.values
        assert other.dtype == column.dtype, name
        assert other.shape == column.shape, name
        assert np.array_equal(other, column), name


class StoreTests:
    """The subclass names the store."""

    name: ClassVar[str]

    def write(self, path: Path, blocks: list[Columns]) -> None:
        with STORES[self.name]().create(path) as add:
            for block in blocks:
                add(block)

    def truncate(self, path: Path, share: float) -> None:
        """Lose the end of what was written."""
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / f"shard{STORES[self.name].suffix}"

    def test_blocks_come_back_by_number_in_any_order(self, path: Path) -> None:
        blocks = [random_columns(seed, count) for seed, count in enumerate((5, 1, 7, 3))]
        self.write(path, blocks)
        shard = STORES[self.name]().open(path)
        assert shard.blocks == 4
        for number in (2, 0, 3, 1, 2):
            assert_same(shard.read(number), blocks[number])

    @pytest.mark.parametrize("count", [0, 1])
    def test_blocks_without_rows_or_values_are_no_special_case(
        self, path: Path, count: int
    ) -> None:
        blocks = [random_columns(0, count, longest=0), random_columns(1, 3)]
        self.write(path, blocks)
        shard = STORES[self.name]().open(path)
        for number, block in enumerate(blocks):
            assert_same(shard.read(number), block)

    def test_the_same_blocks_give_the_same_bytes(self, path: Path) -> None:
        blocks = [random_columns(seed, 4) for seed in range(2)]
        twin = path.with_name(f"twin{path.suffix}")
        self.write(path, blocks)
        self.write(twin, blocks)
        assert path.read_bytes() == twin.read_bytes()

    def test_arrays_that_are_views_are_written_like_any_other(self, path: Path) -> None:
        wide = np.arange(24, dtype=np.float32).reshape(4, 6)
        block: Columns = {
            "every other": np.arange(6)[::2],
            "some columns": Ragged(wide[:, ::2], np.array([0, 1, 1, 4])),
        }
        self.write(path, [block])
        assert_same(STORES[self.name]().open(path).read(0), block)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_a_shard_cut_short_is_refused_by_name(self, path: Path, share: float) -> None:
        self.write(path, [random_columns(0, 50)])
        self.truncate(path, share)
        with pytest.raises(ColdstillError) as caught:
            STORES[self.name]().open(path).read(0)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_shard_or_block_that_is_not_there_is_refused_by_name(self, path: Path) -> None:
        with pytest.raises(ColdstillError, match=r"shard\."):
            STORES[self.name]().open(path)
        self.write(path, [random_columns(0, 5)])
        with pytest.raises(ColdstillError, match=r"shard\..*block 1 "):
            STORES[self.name]().open(path).read(1)

    def test_a_writer_that_raises_midway_leaves_nothing(self, path: Path) -> None:
        def half_written() -> None:
            with whole_file(path) as scratch, STORES[self.name]().create(scratch) as add:
                add(random_columns(0, 5))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half_written()
        assert list(path.parent.iterdir()) == []

    def test_a_shard_without_blocks_is_refused(self, path: Path) -> None:
        with pytest.raises(ValueError, match="at least one block"), whole_file(path) as scratch:
            self.write(scratch, [])
        assert list(path.parent.iterdir()) == []


class TestArrow(StoreTests):
    name = "arrow"

    def test_reading_is_a_view_of_the_mapped_file(self, path: Path) -> None:
        self.write(path, [random_columns(0, 20_000)])
        shard = STORES[self.name]().open(path)
        before = pa.total_allocated_bytes()
        columns = shard.read(0)
        assert pa.total_allocated_bytes() - before < 10_000
        for name, column in columns.items():
            array = column.values if isinstance(column, Ragged) else column
            assert not array.flags.owndata, name
            assert not array.flags.writeable, name

    @pytest.mark.parametrize("offsets", [[0, 2**30, 3], [0, 2, 1], [0, -1, 3]])
    def test_lists_with_impossible_borders_are_refused(
        self, path: Path, offsets: list[int]
    ) -> None:
        column = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), pa.array([1, 2, 3]))
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32))]
        wrong = pa.ListArray.from_buffers(column.type, 2, buffers, children=[column.values])
        batch = pa.RecordBatch.from_arrays([wrong], names=["x"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with pytest.raises(ColdstillError, match="block 0 is damaged"):
            STORES[self.name]().open(path).read(0)

    def test_what_was_read_outlives_its_shard(self, path: Path) -> None:
        block = random_columns(0, 5)
        self.write(path, [block])
        columns = STORES[self.name]().open(path).read(0)
        path.unlink()
        assert_same(columns, block)


def test_every_store_has_its_tests() -> None:
    assert {tests.name for tests in StoreTests.__subclasses__()} == set(STORES)
