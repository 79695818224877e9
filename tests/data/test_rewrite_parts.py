"""Merged stores and slices: which sequences they hold, and in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CodecError
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shrink import chosen_rows, take
from coldstill.data.schema import Block
from coldstill.data.store.reader import open_store
from oracles import (
    FULL,
    assert_same,
    digests,
    everything,
    manifest_for,
    numbers,
    random_block,
    write_missing,
)

if TYPE_CHECKING:
    from pathlib import Path


COUNT = 10
BLOCK = random_block(0, COUNT)
OTHER = random_block(5, 7)


def make(root: Path, block: Block, changes: dict[str, Any] | None = None, **options: Any) -> str:
    """A store; `changes` are fields of its manifest, those of one section as `section.field`."""
    manifest = manifest_for(block, **options)
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        inner = replace(getattr(manifest, section), **{field: value}) if section else value
        manifest = replace(manifest, **{section or field: inner})
    write_missing(root, manifest, block)
    return str(root)


OTHER_CORPUS = {"corpus.fingerprint": "5" * 64, "corpus.documents": 4}


def test_a_merged_store_holds_all_sequences_in_the_given_order(tmp_path: Path) -> None:
    sizes = {"shard_sequences": 3, "block_sequences": 2}
    a = make(tmp_path / "a", BLOCK)
    b = make(tmp_path / "b", OTHER, OTHER_CORPUS, store="zarr", **sizes)
    c = make(tmp_path / "c", random_block(6, 1), {"corpus.fingerprint": "6" * 64})
    merge([b, a, c], f"{tmp_path}/all", None, None)
    found = open_store(tmp_path / "all")
    assert_same(everything(tmp_path / "all"), Block.concatenate([OTHER, BLOCK, random_block(6, 1)]))
    assert found.manifest.store["name"] == "zarr"
    assert (found.manifest.shard_sequences, found.manifest.block_sequences) == (3, 2)
    assert found.manifest.error == CodecError()
    sums = [open_store(path).statistics for path in (a, b, c)]
    assert found.statistics.loss == pytest.approx(sum(s.loss for s in sums))
    assert found.statistics.correct == sum(s.correct for s in sums)


def test_parts_with_other_codecs_are_converted(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", BLOCK)
    other = make(tmp_path / "other", OTHER, OTHER_CORPUS)
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
    assert np.array_equal(found.targets.tail_ids, wanted.targets.tail_ids)


def test_a_merged_store_names_its_corpora(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BLOCK), make(tmp_path / "b", OTHER, OTHER_CORPUS)
    both = merge([a, b], f"{tmp_path}/ab", None, None)
    turned = merge([b, a], f"{tmp_path}/ba", None, None)
    assert both.corpus.documents == turned.corpus.documents == 9 + 4
    prints = [open_store(a).manifest.corpus, open_store(b).manifest.corpus]
    prints += [both.corpus, turned.corpus]
    assert len({corpus.fingerprint for corpus in prints}) == 4


def test_a_merged_store_names_its_parts(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BLOCK), make(tmp_path / "b", OTHER, OTHER_CORPUS)
    take(a, f"{tmp_path}/left", np.arange(6))
    take(a, f"{tmp_path}/right", np.arange(6, COUNT))
    left, right = f"{tmp_path}/left", f"{tmp_path}/right"
    once = merge([left, b, right], f"{tmp_path}/once", None, None)
    merge([left, b], f"{tmp_path}/first", None, None)
    twice = merge([f"{tmp_path}/first", right], f"{tmp_path}/twice", None, None)
    assert once == twice
    assert once.corpus.documents == 9 + 4
    prints = [open_store(path).manifest.corpus.fingerprint for path in (a, b)]
    assert [part.corpus for part in once.parts] == [prints[0], prints[1], prints[0]]
    assert [part.documents for part in once.parts] == [9, 4, 9]
    assert [part.sequences for part in once.parts] == [6, 7, 4]
    some = take(f"{tmp_path}/once", f"{tmp_path}/some", np.array([0, 5, 13, 14, 15, 16]))
    assert [part.sequences for part in some.parts] == [2, 4]
    assert some.parts[1] == once.parts[2]
    assert some.parts[0].packing != once.parts[0].packing


def test_a_repeated_sequence_in_a_merged_store_is_refused(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", BLOCK), make(tmp_path / "b", OTHER, OTHER_CORPUS)
    merge([b, a], f"{tmp_path}/both", None, None)
    for name, part in (("a", a), ("b", b)):
        with pytest.raises(ColdstillError, match=rf"{name}: its sequence 0 is in .*both too"):
            merge([f"{tmp_path}/both", part], f"{tmp_path}/again", None, None)


def test_merging_one_store_copies_it(tmp_path: Path) -> None:
    path = make(tmp_path / "a", BLOCK)
    made = merge([path], f"{tmp_path}/b", None, None)
    assert made.corpus == open_store(path).manifest.corpus
    assert made.packing == open_store(path).manifest.packing
    assert_same(everything(tmp_path / "b"), BLOCK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher.fingerprint", "8" * 64),
        ("teacher.dtype", "bfloat16"),
        ("tokenizer.fingerprint", "8" * 64),
        ("capture.seed", 8),
        ("corpus.split", "heldout"),
        ("packing.isolation", "mask"),
        ("packing.together", False),
        ("packing.separator", (1,)),
        ("packing.sequence_length", 13),
    ],
)
def test_stores_that_do_not_match_are_refused(tmp_path: Path, field: str, value: object) -> None:
    a = make(tmp_path / "a", BLOCK)
    block = replace(OTHER, capture=replace(FULL, seed=8)) if field == "capture.seed" else OTHER
    b = make(tmp_path / "b", block, {**OTHER_CORPUS, field: value})
    with pytest.raises(ColdstillError, match=rf"b: cannot be merged with .*a: {field}") as caught:
        merge([a, b], f"{tmp_path}/both", None, None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "both").exists()


def test_stores_that_differ_only_in_name_and_size_match(tmp_path: Path) -> None:
    a = make(tmp_path / "a", BLOCK)
    b = make(tmp_path / "b", OTHER, {**OTHER_CORPUS, "teacher.name": "elsewhere"})
    assert merge([a, b], f"{tmp_path}/both", None, None).sequences == 17


def test_a_repeated_sequence_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a", BLOCK)
    take(path, f"{tmp_path}/left", np.arange(6))
    take(path, f"{tmp_path}/right", np.arange(5, COUNT))
    for parts, again in ((["a", "a"], 0), (["left", "right"], 5), (["right", "left"], 5)):
        said = f"{parts[1]}: its sequence {again} is in .*{parts[0]} too"
        with pytest.raises(ColdstillError, match=said):
            merge([f"{tmp_path}/{name}" for name in parts], f"{tmp_path}/both", None, None)
    assert not (tmp_path / "both").exists()


def test_sequences_of_two_corpora_may_have_the_same_ids(tmp_path: Path) -> None:
    other = random_block(9, COUNT)
    assert np.array_equal(other.sequences.ids, BLOCK.sequences.ids)
    a, b = make(tmp_path / "a", BLOCK), make(tmp_path / "b", other, OTHER_CORPUS)
    assert merge([a, b], f"{tmp_path}/both", None, None).sequences == 2 * COUNT


def test_the_same_id_and_content_is_a_repetition_in_any_corpus(
    tmp_path: Path,
) -> None:
    a, b = make(tmp_path / "a", BLOCK), make(tmp_path / "b", BLOCK, OTHER_CORPUS)
    with pytest.raises(ColdstillError, match=r"b: its sequence 0 is in .*a too"):
        merge([a, b], f"{tmp_path}/both", None, None)


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_merged_slices_are_the_whole_store(tmp_path: Path, codec: str) -> None:
    path = make(tmp_path / "a", BLOCK, codec=codec)
    parts = []
    for number, rows in enumerate(np.split(np.arange(COUNT), [3, 4, 9])):
        part = take(path, f"{tmp_path}/{number}", rows)
        assert part.sequences == len(rows)
        assert part.packing.fingerprint != open_store(path).manifest.packing.fingerprint
        parts.append(f"{tmp_path}/{number}")
    made = merge(parts, f"{tmp_path}/all", "plain", None)
    assert made.corpus == open_store(path).manifest.corpus
    assert_ids(everything(tmp_path / "all"), everything(path))
    if codec == "plain":
        assert_same(everything(tmp_path / "all"), everything(path))


def assert_ids(found: Block, wanted: Block) -> None:
    np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
    for name in ("head_ids", "tail_ids"):
        one, other = (np.sort(getattr(block.targets, name), axis=1) for block in (found, wanted))
        assert np.array_equal(one, other), name


def test_a_slice_holds_the_chosen_sequences_and_names_them(tmp_path: Path) -> None:
    path = make(tmp_path / "a", BLOCK)
    rows = np.array([1, 4, 5, 8, 9])
    made = take(path, f"{tmp_path}/b", rows)
    assert_same(everything(tmp_path / "b"), BLOCK.take(rows))
    other = take(path, f"{tmp_path}/c", np.array([1, 4, 5, 7, 9]))
    assert made.packing.fingerprint != other.packing.fingerprint
    before = digests(tmp_path / "c")
    with pytest.raises(ColdstillError, match=r"c: made differently: packing\.fingerprint"):
        take(path, f"{tmp_path}/c", rows)
    assert digests(tmp_path / "c") == before


def chosen(root: Path, **wanted: Any) -> list[int]:
    if not root.exists():
        make(root, BLOCK)
    rows: list[int] = chosen_rows(open_store(root), **wanted).tolist()
    return rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("2:5", [2, 3, 4]),
        (":3", [0, 1, 2]),
        ("8:", [8, 9]),
        (":", list(range(10))),
        ("7:99", [7, 8, 9]),
        ("5:5", []),
        ("12:", []),
    ],
)
def test_sequences_are_chosen_by_index(tmp_path: Path, text: str, rows: list[int]) -> None:
    assert chosen(tmp_path / "s", sequences=text) == rows


@pytest.mark.parametrize("text", ["4:5", "3:14", ":9", "20:", ":", "1000:"])
def test_documents_choose_every_sequence_that_holds_one_of_them(tmp_path: Path, text: str) -> None:
    first, _, last = text.partition(":")
    wanted = range(int(first or 0), int(last or 10_000))
    held = BLOCK.sequences.document_ids
    rows = [row for row in range(COUNT) if any(int(d) in wanted for d in held[row])]
    assert chosen(tmp_path / "s", documents=text) == rows
    both = chosen(tmp_path / "s", documents=text, sequences="1:4")
    assert both == [row for row in rows if 1 <= row < 4]


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.5, 5), (0.31, 3), (0.001, 1)])
def test_a_share_is_random_and_reproducible(tmp_path: Path, share: float, count: int) -> None:
    rows = chosen(tmp_path / "s", fraction=share, seed=3)
    assert rows == sorted(set(rows))
    assert len(rows) == count
    assert rows == chosen(tmp_path / "s", fraction=share, seed=3)
    others = [chosen(tmp_path / "s", fraction=share, seed=seed) for seed in range(10)]
    seen = {row for other in others for row in other}
    assert seen == set(rows) if share == 1 else seen > set(rows)


def test_a_share_is_taken_after_the_other_conditions(tmp_path: Path) -> None:
    left = chosen(tmp_path / "s", sequences="2:9", documents="3:20")
    rows = chosen(tmp_path / "s", sequences="2:9", documents="3:20", fraction=0.5)
    assert len(rows) == round(len(left) / 2)
    assert set(rows) < set(left)
    assert chosen(tmp_path / "s", sequences="4:4", fraction=0.5) == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "name what to keep"),
        ({"sequences": "5"}, "--sequences: '5' is not a range"),
        ({"sequences": "-1:5"}, "--sequences: '-1:5' is not a range"),
        ({"sequences": "1:2:3"}, "is not a range"),
        ({"documents": "a:b"}, "--documents: 'a:b' is not a range"),
        ({"documents": ""}, "--documents: '' is not a range"),
        ({"documents": "\u0661:\u0662"}, "is not a range"),
        ({"fraction": 0.0}, "--fraction: 0.0 is not above 0"),
        ({"fraction": 1.01}, "--fraction: 1.01 is not above 0"),
        ({"fraction": -0.5}, "-0.5 is not above 0"),
        ({"fraction": float("nan")}, "--fraction: nan is not above 0"),
    ],
)
def test_an_invalid_choice_is_refused(tmp_path: Path, wanted: Any, said: str) -> None:
    with pytest.raises(ColdstillError, match=said) as caught:
        chosen(tmp_path / "s", **wanted)
    assert "\n" not in str(caught.value)


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a", BLOCK)
    with pytest.raises(ColdstillError, match=r"a: no sequence was chosen"):
        take(path, f"{tmp_path}/b", np.array([], np.int64))
    assert not (tmp_path / "b").exists()
