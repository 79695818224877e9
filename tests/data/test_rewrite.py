"""A store written again: nothing is lost, rounded twice or left incomplete."""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shrink import take
from coldstill.data.store.layout import MEASUREMENTS, TOKENIZER
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import ShardWriter
from oracles import (
    assert_same,
    digests,
    everything,
    manifest_for,
    numbers,
    random_block,
    write_missing,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.schema import Block
    from coldstill.data.store.commit import Commit
    from coldstill.data.store.manifest import Manifest

COUNT = 10
BLOCK = random_block(0, COUNT)
OTHER = random_block(5, 7)
KINDS = list(itertools.product(("compact", "plain"), ("arrow", "zarr")))
FLOAT = 1e-6


def make(root: Path, block: Block = BLOCK, changes: Any = None, **options: Any) -> str:
    """A store with a tokenizer, measurements and the given differences from the usual manifest."""
    manifest = replace(manifest_for(block, **options), **(changes or {}))
    write_missing(root, manifest, block)
    (root / TOKENIZER / "inner").mkdir(parents=True)
    (root / TOKENIZER / "tokenizer.json").write_bytes(b"\x00not even JSON\n")
    (root / TOKENIZER / "inner" / "vocab.txt").write_text("a\r\nb")
    (root / MEASUREMENTS).write_bytes(b'{"speed":  3}')
    return str(root)


def head_by_id(block: Block) -> tuple[Any, Any]:
    targets = block.targets
    order = np.argsort(targets.head_ids, axis=1)
    roots = np.exp(targets.head_logprobs.astype(np.float64) / 2)
    return np.take_along_axis(targets.head_ids, order, 1), np.take_along_axis(roots, order, 1)


def assert_within(found: Block, wanted: Block, manifest: Manifest) -> None:
    """The same sequences and ids, and numbers no further off than the manifest says."""
    np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
    (ids, roots), (wanted_ids, wanted_roots) = head_by_id(found), head_by_id(wanted)
    assert np.array_equal(ids, wanted_ids)
    assert np.array_equal(found.targets.tail_ids, wanted.targets.tail_ids)
    assert np.array_equal(found.targets.log_norm, wanted.targets.log_norm)
    assert np.abs(roots - wanted_roots).max() <= manifest.error.maximum + FLOAT
    for name in ("tail_logprobs", "label_logprob", "entropy"):
        off = np.abs(getattr(found.targets, name) - getattr(wanted.targets, name))
        assert off.max() <= manifest.error.rounding + FLOAT, name


def shards(root: Path) -> dict[str, str]:
    """The bytes of the data, without commit records."""
    found = digests(root)
    return {k: v for k, v in found.items() if k.startswith("shards/") and not k.endswith(".json")}


def commits(path: str | Path) -> list[Commit]:
    return list(open_store(path).commits())


@pytest.mark.parametrize("old", KINDS, ids="-".join)
@pytest.mark.parametrize("new", KINDS, ids="-".join)
def test_any_store_can_be_converted_to_any_other(
    tmp_path: Path, old: tuple[str, str], new: tuple[str, str]
) -> None:
    path = make(tmp_path / "a", codec=old[0], store=old[1])
    told = []
    made = convert(path, f"{tmp_path}/b", *new, notify=lambda *said: told.append(said))
    manifest = open_store(tmp_path / "b").manifest
    assert manifest == made
    assert (manifest.codec["name"], manifest.store["name"]) == new
    before = open_store(path).manifest
    alike: dict[str, Any] = {"codec": before.codec, "store": before.store, "error": before.error}
    assert replace(manifest, **alike) == before
    assert_within(everything(tmp_path / "b"), BLOCK, with_bound(manifest, before))
    assert told == [("write", 4, 10), ("write", 8, 10), ("write", 10, 10)]


def with_bound(manifest: Manifest, before: Manifest) -> Manifest:
    """The manifest with the error that a capture would have measured."""
    codec = before.make_codec("here")
    error = manifest.error
    return replace(
        manifest,
        error=replace(
            error,
            maximum=error.maximum + codec.maximum_error(before.capture),
            rounding=error.rounding + codec.rounding,
        ),
    )


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_converting_back_gives_the_same_bytes(tmp_path: Path, codec: str) -> None:
    path = make(tmp_path / "a", codec=codec)
    convert(path, f"{tmp_path}/b", None, "zarr")
    convert(f"{tmp_path}/b", f"{tmp_path}/c", None, "arrow")
    assert shards(tmp_path / "b") != shards(tmp_path / "a") == shards(tmp_path / "c")
    assert open_store(tmp_path / "c").manifest == open_store(path).manifest


def test_rounded_numbers_are_not_rounded_again(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    convert(first, f"{tmp_path}/b", {"name": "compact", "levels": 31}, None)
    convert(f"{tmp_path}/b", f"{tmp_path}/c", None, "zarr")
    convert(f"{tmp_path}/c", f"{tmp_path}/d", None, {"name": "arrow", "zstd": 0})
    b, c, d = (open_store(tmp_path / name) for name in "bcd")
    assert b.manifest.codec == c.manifest.codec == d.manifest.codec
    assert b.manifest.codec["levels"] == 31
    assert b.manifest.error == c.manifest.error == d.manifest.error
    assert b.statistics == c.statistics == d.statistics
    for found in (c, d):
        assert_same(found.read(np.arange(COUNT)), b.read(np.arange(COUNT)))
        for shard in range(b.manifest.shards):
            for number in range(2 if shard < 2 else 1):
                wanted = b.columns(shard, number)
                columns = found.columns(shard, number)
                assert_columns(columns, wanted)


def assert_columns(found: Any, wanted: Any) -> None:
    for name, column in wanted.items():
        one, other = vars_of(found[name]), vars_of(column)
        assert [array.dtype for array in one] == [array.dtype for array in other], name
        np.testing.assert_equal(one, other, err_msg=name)


def vars_of(column: Any) -> list[Any]:
    """The arrays of a column at any depth of lists."""
    if isinstance(column, np.ndarray):
        return [column]
    return [array for f in fields(column) for array in vars_of(getattr(column, f.name))]


def test_errors_add_up(tmp_path: Path) -> None:
    names: list[Any] = [
        {"name": "compact", "levels": 31},
        "plain",
        {"name": "compact", "levels": 63},
    ]
    path, manifests = make(tmp_path / "0"), []
    for number, codec in enumerate(names):
        manifests.append(convert(path, f"{tmp_path}/{number + 1}", codec, None))
        path = f"{tmp_path}/{number + 1}"
    rounded, exact, again = (manifest.error for manifest in manifests)
    assert rounded.maximum > 0
    assert rounded.kl > 0
    assert exact == rounded
    alone = convert(f"{tmp_path}/0", f"{tmp_path}/alone", names[2], None).error
    assert again.maximum == pytest.approx(rounded.maximum + alone.maximum)
    assert again.rounding == pytest.approx(rounded.rounding + alone.rounding)
    for number, manifest in enumerate(manifests):
        assert_within(everything(tmp_path / str(number + 1)), BLOCK, manifest)


def test_statistics_stay_those_of_the_capture_except_the_distortion(tmp_path: Path) -> None:
    make(tmp_path / "a")
    convert(f"{tmp_path}/a", f"{tmp_path}/b", {"name": "compact", "levels": 31}, None)
    convert(f"{tmp_path}/b", f"{tmp_path}/c", {"name": "compact", "levels": 20}, "zarr")
    convert(f"{tmp_path}/c", f"{tmp_path}/d", "plain", None)
    for a, b, c, d in zip(*(commits(tmp_path / name) for name in "abcd"), strict=True):
        for other in (b, c, d):
            assert asdict(replace(other.statistics, distortion=0.0)) == asdict(a.statistics)
            assert other.tokens == a.tokens
        assert 0.0 == a.statistics.distortion < b.statistics.distortion
        assert b.statistics.distortion < c.statistics.distortion == d.statistics.distortion


@pytest.mark.parametrize("how", ["convert", "merge", "take"])
def test_tokenizer_and_measurements_are_copied(tmp_path: Path, how: str) -> None:
    path = make(tmp_path / "a")
    REWRITES[how](path, f"{tmp_path}/b")
    beside = {k: v for k, v in digests(tmp_path / "a").items() if "shards" not in k}
    found = {k: v for k, v in digests(tmp_path / "b").items() if "shards" not in k}
    beside.pop("manifest.json")
    found.pop("manifest.json")
    found.pop("tokenizer.files.json")  # what was copied has a record of its own
    assert found == beside
    assert len(found) == 3


REWRITES: dict[str, Callable[[str, str], Any]] = {
    "convert": lambda path, to: convert(path, to, "compact", None),
    "merge": lambda path, to: merge([path], to, "compact", "zarr"),
    "take": lambda path, to: take(path, to, np.array([0, 2, 3, 4, 6, 7, 8, 9])),
}


@pytest.mark.parametrize("how", list(REWRITES))
@pytest.mark.parametrize("done", [0, 1])
def test_a_killed_command_is_continued_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, done: int
) -> None:
    path = make(tmp_path / "a", codec="compact" if how == "take" else "plain")
    REWRITES[how](path, f"{tmp_path}/whole")
    written: list[int] = []
    write = ShardWriter.write

    def killed(self: ShardWriter, shard: int, *rest: Any, **options: Any) -> Commit:
        if len(written) == done:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            REWRITES[how](path, f"{tmp_path}/b")
    assert open_store(tmp_path / "b", incomplete=True).done == written
    again: list[int] = []

    def counted(self: ShardWriter, shard: int, *rest: Any, **options: Any) -> Commit:
        again.append(shard)
        return write(self, shard, *rest, **options)

    monkeypatch.setattr(ShardWriter, "write", counted)
    REWRITES[how](path, f"{tmp_path}/b")
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")
    assert not set(again) & set(written)


@pytest.mark.parametrize("to", ["a", "a/", "a/inner", "./a", "x/../a", "a//", "./a/shards/b"])
def test_a_store_is_never_written_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    make(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    before = digests(tmp_path)
    for rewrite in REWRITES.values():
        with pytest.raises(ColdstillError, match="is the store that is read"):
            rewrite("a", to)
    assert digests(tmp_path) == before


def test_a_folder_beside_a_store_may_be_written(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    convert(path, f"{path}b", "plain", None)
    assert_same(everything(f"{path}b"), BLOCK)


def spoil_commit(root: Path) -> None:
    (root / "shards" / "00001.json").unlink()


def spoil_byte(root: Path) -> None:
    file = root / "shards" / "00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(spoil_commit, "incomplete, 2 of 3 shards"), (spoil_byte, "00001.arrow: damaged")],
)
@pytest.mark.parametrize("how", list(REWRITES))
def test_an_incomplete_source_is_refused_in_one_line(
    tmp_path: Path, how: str, spoil: Callable[[Path], None], said: str
) -> None:
    path = make(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(ColdstillError, match=said) as caught:
        REWRITES[how](path, f"{tmp_path}/b")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b" / "shards" / "00001.json").exists()


@pytest.mark.parametrize(
    ("codec", "store", "said"),
    [
        ("dense", None, "codec 'dense' is not known"),
        (None, "tar", "store 'tar' is not known"),
        ({"name": "compact", "levels": 3}, None, "levels 3: 15 to 254"),
        ({"name": "plain", "levels": 63}, None, "codec 'plain': .*levels"),
    ],
)
def test_an_impossible_target_is_refused_before_writing(
    tmp_path: Path, codec: Any, store: Any, said: str
) -> None:
    path = make(tmp_path / "a")
    for rewrite in (convert, lambda path, *rest: merge([path], *rest)):
        with pytest.raises(ColdstillError, match=said):
            rewrite(path, f"{tmp_path}/b", codec, store)
    assert not (tmp_path / "b").exists()


def test_another_store_is_never_overwritten(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    make(tmp_path / "b", OTHER)
    before = digests(tmp_path / "b")
    for rewrite in REWRITES.values():
        with pytest.raises(ColdstillError, match="made differently"):
            rewrite(path, f"{tmp_path}/b")
    assert digests(tmp_path / "b") == before


@pytest.mark.parametrize("how", list(REWRITES))
def test_one_shard_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = make(tmp_path / "a")
    sizes, read = [], StoreReader.read

    def counted(self: StoreReader, rows: Any) -> Block:
        sizes.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(StoreReader, "read", counted)
    REWRITES[how](path, f"{tmp_path}/b")
    assert max(sizes) == 4
