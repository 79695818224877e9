"""Stores that are converted, merged and sliced: nothing is lost, rounded twice or incomplete."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CodecError
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shrink import matching_rows, take
from coldstill.data.schema import Block
from coldstill.data.store.layout import MEASUREMENTS, TOKENIZER
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import ShardWriter
from oracles import (
    FULL,
    assert_same,
    assert_same_columns,
    digests,
    draws,
    everything,
    manifest_for,
    numbers,
    random_block,
    write_missing,
)
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    """The same sequences and ids, and numbers within the error that the manifest states."""
    np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
    (ids, roots), (wanted_ids, wanted_roots) = head_by_id(found), head_by_id(wanted)
    assert np.array_equal(ids, wanted_ids)
    assert np.array_equal(draws(found.targets.tail), draws(wanted.targets.tail))
    assert np.array_equal(found.targets.log_norm, wanted.targets.log_norm)
    assert np.abs(roots - wanted_roots).max() <= manifest.error.maximum + FLOAT
    ours, theirs = numbers(found.targets), numbers(wanted.targets)
    for name in ("known_draws", "label_logprob", "entropy"):
        off = np.abs(ours[name] - theirs[name])
        assert off.max() <= manifest.error.rounding + FLOAT, name


def shards(root: Path) -> dict[str, str]:
    """The bytes of the data, without commit records."""
    found = digests(root)
    return {k: v for k, v in found.items() if k.startswith("shards/") and not k.endswith(".json")}


def commits(path: str | Path) -> list[Commit]:
    return list(open_store(path).commits())


@pytest.mark.slow
@pytest.mark.parametrize("old", KINDS, ids="-".join)
def test_any_store_can_be_converted_to_any_other(tmp_path: Path, old: tuple[str, str]) -> None:
    path = make(tmp_path / "a", codec=old[0], store=old[1])
    before = open_store(path).manifest
    for new in KINDS:
        root, seen = tmp_path / "-".join(new), []
        made = convert(path, str(root), *new, notify=lambda *what: seen.append(what))  # noqa: B023
        manifest = open_store(root).manifest
        assert manifest == made
        assert (manifest.codec["name"], manifest.store["name"]) == new
        alike: dict[str, Any] = {
            "codec": before.codec,
            "store": before.store,
            "error": before.error,
        }
        assert replace(manifest, **alike) == before
        assert_within(everything(root), BLOCK, with_bound(manifest, before))
        assert seen == [("write", 4, 10), ("write", 8, 10), ("write", 10, 10)]


def with_bound(manifest: Manifest, before: Manifest) -> Manifest:
    """The manifest with the error that a capture would have measured."""
    codec, error = before.make_codec("here"), manifest.error
    maximum = error.maximum + codec.maximum_error(before.capture)
    bound = replace(error, maximum=maximum, rounding=error.rounding + codec.rounding)
    return replace(manifest, error=bound)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_converting_back_gives_the_same_bytes(tmp_path: Path, codec: str) -> None:
    path = make(tmp_path / "a", codec=codec)
    convert(path, f"{tmp_path}/b", None, "zarr")
    convert(f"{tmp_path}/b", f"{tmp_path}/c", None, "arrow")
    assert shards(tmp_path / "b") != shards(tmp_path / "a") == shards(tmp_path / "c")
    assert open_store(tmp_path / "c").manifest == open_store(path).manifest


@pytest.mark.slow
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
                columns = found.columns(shard, number)
                assert_same_columns(columns, b.columns(shard, number))


def test_errors_add_up(tmp_path: Path) -> None:
    codecs: list[Any] = [{"name": "compact", "levels": n} for n in (31, 63)]
    codecs.insert(1, "plain")
    path, manifests = make(tmp_path / "0"), []
    for number, codec in enumerate(codecs):
        manifests.append(convert(path, f"{tmp_path}/{number + 1}", codec, None))
        path = f"{tmp_path}/{number + 1}"
    rounded, exact, again = (manifest.error for manifest in manifests)
    assert rounded.maximum > 0
    assert rounded.kl > 0
    assert exact == rounded
    alone = convert(f"{tmp_path}/0", f"{tmp_path}/alone", codecs[2], None).error
    assert again.maximum == pytest.approx(rounded.maximum + alone.maximum)
    assert again.rounding == pytest.approx(rounded.rounding + alone.rounding)
    for number, manifest in enumerate(manifests):
        assert_within(everything(tmp_path / str(number + 1)), BLOCK, manifest)


@pytest.mark.slow
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
def test_tokenizer_and_measurements_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """And one shard is read at a time."""
    path = make(tmp_path / "a")
    sizes, read = [], StoreReader.read

    def counted(self: StoreReader, rows: Any) -> Block:
        sizes.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(StoreReader, "read", counted)
    REWRITES[how](path, f"{tmp_path}/b")
    assert max(sizes) == 4
    found, beside = (
        {name: digest for name, digest in digests(tmp_path / root).items() if "shards" not in name}
        for root in "ba"
    )
    assert found.pop("manifest.json")
    assert beside.pop("manifest.json")
    found.pop("tokenizer.files.json")  # what was copied has a record of its own
    assert found == beside
    assert len(found) == 3


REWRITES: dict[str, Callable[[str, str], Any]] = {
    "convert": lambda path, to: convert(path, to, "compact", None),
    "merge": lambda path, to: merge([path], to, "compact", "zarr"),
    "take": lambda path, to: take(path, to, np.array([0, 2, 3, 4, 6, 7, 8, 9])),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", list(REWRITES))
@pytest.mark.parametrize("done", [0, 1])
def test_a_killed_command_is_continued_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, done: int
) -> None:
    path = make(tmp_path / "a", codec="compact" if how == "take" else "plain")
    REWRITES[how](path, f"{tmp_path}/whole")
    written: list[int] = []
    write = ShardWriter.write
    limit = done

    def counted(self: ShardWriter, shard: int, *rest: Any, **options: Any) -> Commit:
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, *rest, **options)

    monkeypatch.setattr(ShardWriter, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        REWRITES[how](path, f"{tmp_path}/b")
    assert open_store(tmp_path / "b", incomplete=True).done == written
    limit = 99
    REWRITES[how](path, f"{tmp_path}/b")
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")
    assert len(set(written)) == len(written)  # no shard twice


def test_a_store_is_never_written_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    before = digests(tmp_path)
    for to in ("a", "a/", "a/inner", "./a", "x/../a", "a//", "./a/shards/b"):
        for rewrite in REWRITES.values():
            assert "is the store that is read" in refusal(rewrite, "a", to)
    assert digests(tmp_path) == before
    convert("a", "ab", "plain", None)  # beside it
    assert_same(everything("ab"), BLOCK)


@pytest.mark.parametrize("how", list(REWRITES))
def test_an_incomplete_source_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = make(tmp_path / "a")
    file = tmp_path / "a" / "shards" / "00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "00001.arrow: damaged" in refusal(REWRITES[how], path, f"{tmp_path}/b")
    file.with_suffix(".json").unlink()
    assert "incomplete, 2 of 3 shards" in refusal(REWRITES[how], path, f"{tmp_path}/b")
    assert not (tmp_path / "b" / "shards" / "00001.json").exists()


def test_an_impossible_target_is_refused_before_writing(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    cases: list[tuple[Any, Any, str]] = [
        ("dense", None, "codec 'dense' is not known"),
        (None, "tar", "store 'tar' is not known"),
        ({"name": "compact", "levels": 3}, None, "levels 3: 15 to 254"),
        ({"name": "plain", "levels": 63}, None, "codec 'plain': .*levels"),
    ]
    for codec, store, message in cases:
        for rewrite in (convert, lambda path, *rest: merge([path], *rest)):
            assert re.search(message, refusal(rewrite, path, f"{tmp_path}/b", codec, store))
    assert not (tmp_path / "b").exists()
    make(tmp_path / "b", OTHER)
    before = digests(tmp_path / "b")
    for rewrite in REWRITES.values():  # another store is never overwritten
        assert "made differently" in refusal(rewrite, path, f"{tmp_path}/b")
    assert digests(tmp_path / "b") == before


def make_store(
    root: Path, block: Block, changes: dict[str, Any] | None = None, **options: Any
) -> str:
    """A store; `changes` are fields of its manifest, those of one section as `section.field`."""
    manifest = manifest_for(block, **options)
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        inner = replace(getattr(manifest, section), **{field: value}) if section else value
        manifest = replace(manifest, **{section or field: inner})
    write_missing(root, manifest, block)
    return str(root)


OTHER_CORPUS = {"corpus.fingerprint": "5" * 64, "corpus.documents": 4}


@pytest.mark.slow
def test_a_merged_store_holds_all_sequences_in_the_given_order(tmp_path: Path) -> None:
    sizes = {"shard_sequences": 3, "block_sequences": 2}
    a = make_store(tmp_path / "a", BLOCK)
    b = make_store(tmp_path / "b", OTHER, OTHER_CORPUS, store="zarr", **sizes)
    c = make_store(tmp_path / "c", random_block(6, 1), {"corpus.fingerprint": "6" * 64})
    merge([b, a, c], f"{tmp_path}/all", None, None)
    found = open_store(tmp_path / "all")
    assert_same(everything(tmp_path / "all"), Block.concatenate([OTHER, BLOCK, random_block(6, 1)]))
    assert found.manifest.store["name"] == "zarr"
    assert (found.manifest.shard_sequences, found.manifest.block_sequences) == (3, 2)
    assert found.manifest.error == CodecError()
    sums = [open_store(path).statistics for path in (a, b, c)]
    assert found.statistics.loss == pytest.approx(sum(s.loss for s in sums))
    assert found.statistics.correct == sum(s.correct for s in sums)


@pytest.mark.slow
def test_parts_with_other_codecs_are_converted(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "plain", BLOCK)
    other = make_store(tmp_path / "other", OTHER, OTHER_CORPUS)
    rounded = convert(other, f"{tmp_path}/compact", {"name": "compact", "levels": 31}, None)
    made = merge([plain, f"{tmp_path}/compact"], f"{tmp_path}/all", None, None)
    assert made.codec == {"name": "plain"}
    assert made.error == rounded.error
    wanted = Block.concatenate([BLOCK, everything(tmp_path / "compact")])
    assert_same(everything(tmp_path / "all"), wanted)
    again = merge([plain, f"{tmp_path}/compact"], f"{tmp_path}/zarr", "compact", "zarr")
    assert (again.codec["name"], again.store["name"]) == ("compact", "zarr")
    assert again.error.maximum > rounded.error.maximum
    found = everything(tmp_path / "zarr")
    np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
    assert np.array_equal(draws(found.targets.tail), draws(wanted.targets.tail))


def test_a_merged_store_names_its_corpora_and_parts(tmp_path: Path) -> None:
    a, b = make_store(tmp_path / "a", BLOCK), make_store(tmp_path / "b", OTHER, OTHER_CORPUS)
    take(a, f"{tmp_path}/left", np.arange(6))
    take(a, f"{tmp_path}/right", np.arange(6, COUNT))
    left, right = f"{tmp_path}/left", f"{tmp_path}/right"
    once = merge([left, b, right], f"{tmp_path}/once", None, None)
    first = merge([left, b], f"{tmp_path}/first", None, None)
    turned = merge([b, left], f"{tmp_path}/turned", None, None)
    assert merge([f"{tmp_path}/first", right], f"{tmp_path}/twice", None, None) == once
    assert once.corpus.documents == first.corpus.documents == turned.corpus.documents == 9 + 4
    prints = [open_store(path).manifest.corpus.fingerprint for path in (a, b)]
    assert len({*prints, first.corpus.fingerprint, turned.corpus.fingerprint}) == 4
    assert [part.corpus for part in once.parts] == [prints[0], prints[1], prints[0]]
    assert [part.documents for part in once.parts] == [9, 4, 9]
    assert [part.sequences for part in once.parts] == [6, 7, 4]
    some = take(f"{tmp_path}/once", f"{tmp_path}/some", np.array([0, 5, 13, 14, 15, 16]))
    assert [part.sequences for part in some.parts] == [2, 4]
    assert some.parts[1] == once.parts[2]
    assert some.parts[0].packing != once.parts[0].packing
    copied = merge([a], f"{tmp_path}/copied", None, None)
    manifest = open_store(a).manifest
    assert (copied.corpus, copied.packing) == (manifest.corpus, manifest.packing)
    assert_same(everything(tmp_path / "copied"), BLOCK)


def test_stores_that_do_not_match_are_refused(tmp_path: Path) -> None:
    a = make_store(tmp_path / "a", BLOCK)
    for field, value in {
        "teacher.fingerprint": "8" * 64,
        "teacher.dtype": "bfloat16",
        "tokenizer.fingerprint": "8" * 64,
        "capture.seed": 8,
        "corpus.split": "heldout",
        "packing.isolation": "mask",
        "packing.together": False,
        "packing.separator": (1,),
        "packing.sequence_length": 13,
    }.items():
        block = replace(OTHER, capture=replace(FULL, seed=8)) if field == "capture.seed" else OTHER
        b = make_store(tmp_path / field, block, {**OTHER_CORPUS, field: value})
        message = refusal(merge, [a, b], f"{tmp_path}/both", None, None)
        assert message.startswith(f"{b}: cannot be merged with {a}: {field}")
    assert not (tmp_path / "both").exists()
    b = make_store(tmp_path / "b", OTHER, {**OTHER_CORPUS, "teacher.name": "elsewhere"})
    assert merge([a, b], f"{tmp_path}/both", None, None).sequences == 17


def test_a_repeated_sequence_is_refused(tmp_path: Path) -> None:
    """The same id and content is a repetition, in any corpus."""
    a, b = make_store(tmp_path / "a", BLOCK), make_store(tmp_path / "b", OTHER, OTHER_CORPUS)
    make_store(tmp_path / "again", BLOCK, OTHER_CORPUS)
    merge([b, a], f"{tmp_path}/merged", None, None)
    take(a, f"{tmp_path}/left", np.arange(6))
    take(a, f"{tmp_path}/right", np.arange(5, COUNT))
    for one, other, row in (
        ("a", "a", 0),
        ("left", "right", 5),
        ("right", "left", 5),
        ("a", "again", 0),
        ("merged", "a", 0),
        ("merged", "b", 0),
    ):
        parts = [f"{tmp_path}/{name}" for name in (one, other)]
        message = refusal(merge, parts, f"{tmp_path}/both", None, None)
        assert re.search(f"{other}: its sequence {row} is in .*{one} too", message)
    assert not (tmp_path / "both").exists()
    # other sequences of another corpus may have the same ids
    block = random_block(9, COUNT)
    assert np.array_equal(block.sequences.ids, BLOCK.sequences.ids)
    same_ids = make_store(tmp_path / "ids", block, OTHER_CORPUS)
    assert merge([a, same_ids], f"{tmp_path}/both", None, None).sequences == 2 * COUNT


def test_merged_slices_are_the_whole_store(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", BLOCK)
    parts = []
    for number, rows in enumerate(np.split(np.arange(COUNT), [3, 4, 9])):
        part = take(path, f"{tmp_path}/{number}", rows)
        assert part.sequences == len(rows)
        assert part.packing.fingerprint != open_store(path).manifest.packing.fingerprint
        parts.append(f"{tmp_path}/{number}")
    made = merge(parts, f"{tmp_path}/all", "plain", None)
    assert made.corpus == open_store(path).manifest.corpus
    assert_same(everything(tmp_path / "all"), BLOCK)


def test_a_slice_holds_the_chosen_sequences_and_names_them(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", BLOCK)
    rows = np.array([1, 4, 5, 8, 9])
    made = take(path, f"{tmp_path}/b", rows)
    assert_same(everything(tmp_path / "b"), BLOCK.take(rows))
    other = take(path, f"{tmp_path}/c", np.array([1, 4, 5, 7, 9]))
    assert made.packing.fingerprint != other.packing.fingerprint
    before = digests(tmp_path / "c")
    message = refusal(take, path, f"{tmp_path}/c", rows)
    assert "c: made differently: packing.fingerprint" in message
    assert digests(tmp_path / "c") == before
    message = refusal(take, path, f"{tmp_path}/d", np.array([], np.int64))
    assert "a: no sequence was chosen" in message
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return open_store(make_store(tmp_path_factory.mktemp("store") / "s", BLOCK))


def chosen(store: StoreReader, **wanted: Any) -> list[int]:
    rows: list[int] = matching_rows(store, **wanted).tolist()
    return rows


def test_sequences_are_chosen_by_index(store: StoreReader) -> None:
    for text, rows in {
        "2:5": range(2, 5),
        ":3": range(3),
        "8:": range(8, 10),
        ":": range(10),
        "7:99": range(7, 10),
        "5:5": range(0),
        "12:": range(0),
    }.items():
        assert chosen(store, sequences=text) == list(rows)


def test_documents_choose_every_sequence_that_holds_one_of_them(store: StoreReader) -> None:
    held = BLOCK.sequences.document_ids
    for text in ("4:5", "3:14", ":9", "20:", ":", "1000:"):
        first, _, last = text.partition(":")
        wanted = range(int(first or 0), int(last or 10_000))
        rows = [row for row in range(COUNT) if any(int(d) in wanted for d in held[row])]
        assert chosen(store, documents=text) == rows
        both = chosen(store, documents=text, sequences="1:4")
        assert both == [row for row in rows if 1 <= row < 4]


def test_a_share_is_random_reproducible_and_taken_after_the_other_conditions(
    store: StoreReader,
) -> None:
    for share, count in ((1.0, 10), (0.5, 5), (0.31, 3), (0.001, 1)):
        rows = chosen(store, fraction=share, seed=3)
        assert rows == sorted(set(rows)) == chosen(store, fraction=share, seed=3)
        assert len(rows) == count
        seen = {row for seed in range(10) for row in chosen(store, fraction=share, seed=seed)}
        assert seen == set(rows) if share == 1 else seen > set(rows)
    left = chosen(store, sequences="2:9", documents="3:20")
    rows = chosen(store, sequences="2:9", documents="3:20", fraction=0.5)
    assert len(rows) == round(len(left) / 2)
    assert set(rows) < set(left)
    assert chosen(store, sequences="4:4", fraction=0.5) == []


def test_an_invalid_choice_is_refused(store: StoreReader) -> None:
    assert "name what to keep" in refusal(chosen, store)
    for text in ("5", "-1:5", "1:2:3", "a:b", "", "\u0661:\u0662"):
        for option in ("sequences", "documents"):
            message = refusal(chosen, store, **{option: text})
            assert f"--{option}: {text!r} is not a range" in message
    for share in (0.0, 1.01, -0.5, float("nan")):
        assert f"--fraction: {share} is not above 0" in refusal(chosen, store, fraction=share)
