"""What every store promises; a new one inherits `StoreTests` and gives its name and settings."""

from __future__ import annotations

import json
import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import whole_file, whole_folder
from coldstill.data.formats import STORES
from coldstill.data.ragged import Ragged
from oracles import assert_same_columns
from refusals import refusal

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
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


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a shard by its name inside it."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.is_file()}


class StoreTests:
    """The subclass names the store, and its settings where they are not the defaults."""

    name: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}

    @property
    def store(self) -> Any:
        return STORES[self.name](**self.settings)

    def write(self, path: Path, blocks: list[Columns]) -> None:
        with self.store.create(path) as add:
            for block in blocks:
                add(block)

    def whole(self, path: Path) -> AbstractContextManager[Path]:
        return whole_folder(path) if self.store.is_folder else whole_file(path)

    def refusal(self, path: Path) -> str:
        """The error when the first block is read."""
        message = refusal(lambda: self.store.open(path).read(0))
        assert str(path) in message
        return message

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / f"shard{self.store.suffix}"

    def test_blocks_are_read_by_number_in_any_order(self, path: Path) -> None:
        """Also blocks without rows or values, and arrays that are views."""
        wide = np.arange(24, dtype=np.float32).reshape(4, 6)
        views: Columns = {
            "every other": np.arange(6)[::2],
            "some columns": Ragged(wide[:, ::2], np.array([0, 1, 1, 4])),
        }
        none, one, empty = (random_columns(0, count, longest=0) for count in (0, 1, 4))
        some = [random_columns(seed, count) for seed, count in enumerate((5, 1, 7, 3))]
        shards = ([*some, some[2]], [none, some[3]], [one, some[3]], [empty, empty], [views])
        for number, blocks in enumerate(shards):
            own = path.with_name(f"{number}{path.suffix}")
            self.write(own, blocks)
            assert own.is_dir() == self.store.is_folder
            shard = self.store.open(own)
            assert shard.blocks == len(blocks)
            for block in reversed(range(len(blocks))):
                assert_same_columns(shard.read(block), blocks[block])
        assert len(list(path.parent.iterdir())) == len(shards)

    def test_the_same_blocks_give_the_same_bytes(self, path: Path) -> None:
        blocks = [random_columns(seed, 3000) for seed in range(2)]
        twin = path.with_name(f"twin{path.suffix}")
        self.write(path, blocks)
        self.write(twin, blocks)
        assert contents(path) == contents(twin)
        for compress in (False, True):
            fitting = path.with_name(f"{compress}{path.suffix}")
            store = STORES[self.name].fitting(compress=compress)
            with store.create(fitting) as add:
                add(blocks[0])
            assert_same_columns(store.open(fitting).read(0), blocks[0])

    def test_a_shard_with_a_damaged_or_missing_file_is_refused_by_name(self, path: Path) -> None:
        with pytest.raises(ColdstillError, match=r"shard\."):
            self.store.open(path)
        self.write(path, [random_columns(0, 50)])
        random = np.random.default_rng(0)
        for name, whole in contents(path).items():
            cut = [whole[: int(len(whole) * share)] for share in (0.0, 0.01, 0.5, 0.99)]
            for other in (*cut, bytes(len(whole)), random.bytes(len(whole))):
                (path / name).write_bytes(other)
                self.refusal(path)
            (path / name).unlink()
            self.refusal(path)
            (path / name).write_bytes(whole)
        shard = self.store.open(path)
        assert shard.blocks == 1
        for block in (1, -1):
            with pytest.raises(ColdstillError, match=rf"shard\..*block {block} "):
                shard.read(block)

    def test_a_writer_that_fails_leaves_nothing(self, path: Path) -> None:
        def half_written() -> None:
            with self.whole(path) as scratch, self.store.create(scratch) as add:
                add(random_columns(0, 5))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half_written()
        with pytest.raises(ValueError, match="at least one block"), self.whole(path) as scratch:
            self.write(scratch, [])
        assert list(path.parent.iterdir()) == []
        store: Any = STORES[self.name]
        for level in (-1, 23):
            with pytest.raises(ValueError, match=str(level)):
                store(zstd=level)


class TestArrow(StoreTests):
    name = "arrow"

    def test_reading_is_a_view_of_the_mapped_file(self, path: Path) -> None:
        block = random_columns(0, 20_000)
        self.write(path, [block])
        shard = self.store.open(path)
        before = pa.total_allocated_bytes()
        columns = shard.read(0)
        assert pa.total_allocated_bytes() - before < 10_000
        for name, column in columns.items():
            array = column.values if isinstance(column, Ragged) else column
            assert not array.flags.owndata, name
            assert not array.flags.writeable, name
        path.unlink()  # it stays valid
        assert_same_columns(columns, block)

    def test_lists_with_impossible_borders_are_refused(self, path: Path) -> None:
        column = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), pa.array([1, 2, 3]))
        for offsets in ([0, 2**30, 3], [0, 2, 1], [0, -1, 3]):
            buffers = [None, pa.py_buffer(np.array(offsets, np.int32))]
            wrong = pa.ListArray.from_buffers(column.type, 2, buffers, children=[column.values])
            batch = pa.RecordBatch.from_arrays([wrong], names=["x"])
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            assert "block 0 is damaged" in self.refusal(path)
            path.unlink()


class TestArrowCompressed(StoreTests):
    name = "arrow"
    settings: ClassVar[dict[str, Any]] = {"zstd": 3}


NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
NUMBERS += ["float32", "float64"]


def any_columns(seed: int) -> list[Columns]:
    """Some blocks with a flat column and a list of every type; half of the lists share borders."""
    random = np.random.default_rng(seed)

    def numbers(kind: str, *shape: int) -> Any:
        if kind.startswith("float"):
            return random.normal(size=shape).astype(kind)
        limits = np.iinfo(kind)
        return random.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)

    widths = random.integers(-1, 4, len(NUMBERS)).tolist()  # -1: one number an entry
    blocks = []
    for count in random.integers(0, 40, int(random.integers(1, 5))).tolist():
        borders = np.zeros((2, count + 1), np.int64)
        np.cumsum(random.integers(0, 6, (2, count)), axis=1, out=borders[:, 1:])
        block: Columns = {}
        for i, (kind, width) in enumerate(zip(NUMBERS, widths, strict=True)):
            offsets = borders[i % 2]
            shape = [int(offsets[-1])] + [width] * (width >= 0)
            block[f"flat {kind}"] = numbers(kind, count)
            block[f"list {kind}"] = Ragged(numbers(kind, *shape), offsets)
        blocks.append(block)
    return blocks


class TestZarr(StoreTests):
    name = "zarr"

    def group(self, path: Path, mode: str = "r") -> Any:
        import zarr

        return zarr.open(path, mode=mode)

    @pytest.mark.parametrize("seed", range(3))
    def test_any_types_and_shapes_are_read_here_and_by_other_tools(
        self, path: Path, seed: int
    ) -> None:
        blocks = any_columns(seed)
        self.write(path, blocks)
        shard = self.store.open(path)
        assert shard.blocks == len(blocks)
        for number, block in enumerate(blocks):
            found = shard.read(number)
            assert_same_columns(found, block)
            assert list(found) == list(block)
        group = self.group(path)
        assert group.attrs["block_rows"] == [
            sum(len(block["flat int8"]) for block in blocks[:end]) for end in range(len(blocks) + 1)
        ]
        for name in blocks[0]:
            parts: list[Any] = [block[name] for block in blocks]
            if name.startswith("flat"):
                assert dict(group[name].attrs) == {}
                assert np.array_equal(group[name][:], np.concatenate(parts)), name
                continue
            whole = Ragged.concatenate(parts)
            assert np.array_equal(group[name][:], whole.values), name
            assert np.array_equal(group[group[name].attrs["offsets"]][:], whole.offsets), name
        tensorstore = pytest.importorskip("tensorstore")
        for name, array in group.arrays():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
            found = tensorstore.open(spec).result().read().result()
            assert found.dtype == array.dtype, name
            assert np.array_equal(found, array[...]), name

    def test_borders_that_columns_share_are_written_once(self, path: Path) -> None:
        offsets = np.array([0, 2, 2, 5])
        block: Columns = {
            "ids": np.arange(3),
            "tokens": Ragged(np.arange(9), np.array([0, 3, 6, 9])),
            "positions": Ragged(np.arange(5), offsets),
            "head": Ragged(np.zeros((5, 4)), offsets.copy()),
        }
        self.write(path, [block, block])
        group = self.group(path)
        names = {"ids", "tokens", "tokens.offsets", "positions", "positions.offsets", "head"}
        assert set(group.array_keys()) == names
        assert group["head"].attrs["offsets"] == "positions.offsets"
        assert group["positions.offsets"][:].tolist() == [0, 2, 2, 5, 7, 7, 10]
        assert group["positions.offsets"].dtype == np.int64
        assert len(contents(path)) == 2 * len(names) + 1

    def test_missing_or_flipped_data_are_never_read(self, path: Path) -> None:
        self.write(path, [random_columns(0, 20) | {"zeros": np.zeros(20)}])
        random = np.random.default_rng(0)
        for name, whole in contents(path).items():
            if name.endswith("zarr.json"):
                continue
            for place in random.integers(0, len(whole), 8).tolist():
                changed = bytearray(whole)
                changed[place] ^= 1 << int(random.integers(8))
                (path / name).write_bytes(changed)
                assert "block 0 is damaged" in self.refusal(path)
            (path / name).write_bytes(whole)
        shard = self.store.open(path)
        (path / "list" / "c" / "0").unlink()
        with pytest.raises(ColdstillError, match="block 0 is damaged: 'list' has 0 bytes"):
            shard.read(0)
        (path / "zeros" / "c" / "0").unlink()
        assert " has 0 bytes of data" in self.refusal(path)

    def test_a_damaged_shape_is_refused_before_memory_is_allocated(self, path: Path) -> None:
        self.write(path, [random_columns(0, 5)])
        shapes: dict[str, list[list[int]]] = {
            "list": [[2**40], [8, 1], []],
            "list of rows": [[2**40, 3], [8, 2**40]],
            "list.offsets": [[2**40]],
            "int64": [[2**40]],
        }
        for name, shape in [(key, each) for key in shapes for each in shapes[key]]:
            described = path / name / "zarr.json"
            whole = described.read_text()
            described.write_text(json.dumps(json.loads(whole) | {"shape": shape}))
            tracemalloc.start()
            assert "not a whole Zarr group" in self.refusal(path), (name, shape)
            assert tracemalloc.get_traced_memory()[1] < 2**24, (name, shape)
            tracemalloc.stop()
            described.write_text(whole)

    def test_a_group_with_wrong_or_missing_attributes_is_refused(self, path: Path) -> None:
        self.write(path, [random_columns(0, 5)])
        group = self.group(path, "r+")
        whole = dict(group.attrs)
        rows: list[Any] = [[], [0, 2**40], [0, 4], [1, 5], [0, 6, 5], [0, -1, 5], "five", None]
        sizes = (None, {"weather": 5}, {"int64": 10**9}, {"list": 10**9})
        changed = [{"block_rows": r} for r in rows] + [{"bytes": size} for size in sizes]
        for attributes in (*(whole | change for change in changed), {}):
            group.attrs.put(attributes)
            assert "not a whole Zarr group" in self.refusal(path), attributes
        group.attrs.put(whole)
        group["bytes"].attrs["offsets"] = "weather"
        assert "'bytes' lacks its borders 'weather'" in self.refusal(path)

    def test_lists_with_impossible_borders_are_refused(self, path: Path) -> None:
        self.write(path, [{"x": Ragged(np.arange(3), np.array([0, 2, 3]))}])
        for offsets in ([0, 2**40, 3], [0, 2, 1], [0, -1, 3], [1, 2, 3]):
            group = self.group(path, "r+")
            group["x.offsets"][:] = offsets  # everything else agrees with them
            size = (path / "x.offsets" / "c" / "0").stat().st_size
            group.attrs["bytes"] = {**group.attrs["bytes"], "x.offsets": size}
            assert "block 0 is damaged: 'x" in self.refusal(path)

    def test_columns_that_cannot_be_one_shard_are_refused(self, path: Path) -> None:
        first: Columns = {"a": np.zeros(3, np.int32)}
        wrongs: tuple[Columns, ...] = (
            {"a": np.zeros(3)},
            {"a": np.zeros(3, np.int32), "b": np.zeros(3)},
            {"a": Ragged(np.zeros(3, np.int32), np.array([0, 1, 2, 3]))},
            {"b": np.zeros(3, np.int32)},
        )
        for wrong in wrongs:
            with pytest.raises(ValueError, match="differ"):
                self.write(path, [first, wrong])
        for dtype in ("bool", "object", "complex64", "U3", "M8[s]", "float16"):
            with pytest.raises(ValueError, match="x: "):
                self.write(path, [{"x": np.zeros(3).astype(dtype)}])
        with pytest.raises(ValueError, match="rows"):
            self.write(path, [{"x": np.zeros(3), "y": np.zeros(4)}])
        assert not path.exists()

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    @pytest.mark.parametrize("start", ["fork", "spawn"])
    def test_an_open_shard_is_read_on_in_other_processes(self, path: Path, start: str) -> None:
        blocks = [random_columns(seed, 50) for seed in range(4)]
        self.write(path, blocks)
        shard = self.store.open(path)
        # the thread that zarr reads with is running from now on
        assert_same_columns(shard.read(0), blocks[0])
        context = multiprocessing.get_context(start)
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            for block, found in zip(blocks, pool.map(shard.read, range(4)), strict=True):
                assert_same_columns(found, block)
        assert_same_columns(shard.read(3), blocks[3])


class TestZarrUncompressed(TestZarr):
    settings: ClassVar[dict[str, Any]] = {"zstd": 0}


class TestZarrPacked(StoreTests):
    name = "zarr"
    settings: ClassVar[dict[str, Any]] = {"packed": True}

    def test_two_arrays_hold_everything_and_say_what_they_hold(self, path: Path) -> None:
        """Read with zarr alone, as `data/FORMAT.md` says."""
        import zarr

        blocks = any_columns(0)
        self.write(path, blocks)
        group = zarr.open(path, mode="r")
        assert set(group.array_keys()) == {"bytes", "entries"}
        assert len(contents(path)) == 5
        for number, block in enumerate(blocks):
            row, place, found = group["bytes"][number], 0, {}
            for column, count in zip(
                group.attrs["columns"], group["entries"][number].tolist(), strict=True
            ):
                name, dtype, width, _ = column
                size = count * (1 if width is None else width) * np.dtype(dtype).itemsize
                planes = row[place : place + size].reshape(np.dtype(dtype).itemsize, -1)
                found[name] = np.ascontiguousarray(planes.T).view(dtype).ravel()
                place += size
            assert not row[place:].any()
            for name, _, _, borders in group.attrs["columns"]:
                if name not in block:
                    continue
                wanted: Any = block[name]
                if borders is not None:
                    assert np.array_equal(found[borders], wanted.lengths)
                    wanted = wanted.values
                assert found[name].tobytes() == np.ascontiguousarray(wanted).tobytes()

    def test_missing_or_flipped_data_are_never_read(self, path: Path) -> None:
        self.write(path, [random_columns(0, 20) | {"zeros": np.zeros(20)}])
        random = np.random.default_rng(0)
        for name, whole in contents(path).items():
            if name.endswith("zarr.json"):
                continue
            for place in random.integers(0, len(whole), 8).tolist():
                changed = bytearray(whole)
                changed[place] ^= 1 << int(random.integers(8))
                (path / name).write_bytes(changed)
                self.refusal(path)
            (path / name).write_bytes(whole)
        shard = self.store.open(path)
        (path / "bytes" / "c" / "0" / "0").unlink()
        with pytest.raises(ColdstillError, match="block 0 is damaged: 'bytes' has 0 bytes"):
            shard.read(0)

    def test_wrong_sizes_are_refused(self, path: Path) -> None:
        import zarr

        self.write(path, [random_columns(0, 5)])
        group = zarr.open(path, mode="r+")
        whole = dict(group.attrs)
        name, dtype, width, borders = whole["columns"][0]
        for column in ([name, "float16", width, borders], [name, dtype, 2**40, borders], [name]):
            group.attrs.put({**whole, "columns": [column, *whole["columns"][1:]]})
            self.refusal(path)
        changes: tuple[dict[str, Any], ...] = (
            {"columns": whole["columns"][1:]},
            {"columns": None},
            {"bytes": {}},
        )
        for changed in changes:
            group.attrs.put(whole | changed)
            assert "not a whole Zarr group" in self.refusal(path)


class TestZarrSmallest(StoreTests):
    name = "zarr"
    settings: ClassVar[dict[str, Any]] = {"zstd": 22}


def test_every_store_has_its_tests() -> None:
    assert {tests.name for tests in StoreTests.__subclasses__()} == set(STORES)
