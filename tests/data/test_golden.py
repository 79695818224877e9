"""Stores of earlier versions: every value stays readable, and an incomplete one is continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.formats import STORES
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.verify import verify
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Sequences
from coldstill.data.store.manifest import FORMAT_VERSION
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter, fitted
from oracles import digests, manifest_for, numbers, random_block, write_missing

WIDE = ((5, 300), (0, 50), (8, 0))
GOLDEN = Path(__file__).parents[1] / "golden"
STORED = sorted(path.parent for path in GOLDEN.glob("v*/*/manifest.json"))


@pytest.mark.parametrize("root", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_golden_store_is_whole_and_holds_the_same_values(root: Path) -> None:
    expected = json.loads(root.with_name(f"{root.name}.json").read_text())
    store = open_store(root)
    block = store.read(np.arange(len(store)))
    found = {f.name: getattr(block.sequences, f.name) for f in fields(Sequences)}
    if (branches := found.pop("branches")) is not None:
        found |= {f"branches.{name}": own for name, own in branches.columns().items()}
    found |= numbers(block.targets)
    found["tail_ids"], found["tail_logprobs"] = found.pop("draws"), found.pop("known_draws")
    for name, wanted in expected.items():
        assert_same(found[name], wanted, name)
    chunks = {"chunk_sizes"} if store.manifest.capture.chunks else set()
    assert expected.keys() - {"chunk_sizes"} | chunks == found.keys() - {"chunk_sizes"} | chunks
    assert len(expected) == 14 + len(chunks) + 4 * store.manifest.capture.branches
    problems = [str(problem) for problem in verify(str(root))]
    if not (root / "tokenizer").exists():  # 300,000 tokens are too many for a golden store
        assert "tokenizer: missing" in problems.pop(0)
    assert problems == []


def test_there_is_a_golden_store_of_each_codec_and_format() -> None:
    names = {root.name for root in STORED if root.parent.name == f"v{FORMAT_VERSION}"}
    every = {f"{codec}-{store}" for codec in CODECS for store in STORES}
    every |= {f"{kind}-{name}" for kind in ("chunks", "branches") for name in every}
    assert names == every | {f"compact-arrow-{head}-{tail}" for head, tail in WIDE}


@pytest.mark.parametrize(("head", "tail"), WIDE)
def test_every_part_of_the_codec_is_used_by_a_golden_store(head: int, tail: int) -> None:
    """A change of the format that encoder and decoder make alike cannot pass."""
    store = open_store(GOLDEN / f"v{FORMAT_VERSION}" / f"compact-arrow-{head}-{tail}")
    found: dict[str, list[int]] = {}
    for shard in range(store.manifest.shards):
        for number in range(len(store.manifest.block_sizes(shard))):
            for name, column in store.columns(shard, number).items():
                values = column.values if isinstance(column, Ragged) else column
                found.setdefault(name, []).extend(values.ravel().tolist())
    assert [name for name, values in found.items() if not values] == []
    codes = set(found["label_code"])
    assert {0, head} <= codes  # no place in the record, and the last of the head
    assert not tail or {head + 1, head + 2} <= codes  # the most frequent sample, and the first
    assert not tail or max(codes) > head + 2


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_golden_store_in_other_tokens_has_every_kind_of_chunk(codec: str, store: str) -> None:
    found = open_store(GOLDEN / f"v{FORMAT_VERSION}" / f"chunks-{codec}-{store}")
    rows = np.arange(len(found))
    sizes = found.read(rows).targets.chunk_sizes
    assert {-1, 0, 1, 2} == set(sizes.ravel().tolist())
    made = found.manifest.retokenized
    assert made is not None
    assert made.positions == (sizes > 0).sum() < len(sizes)
    assert 0 < made.ambiguous_mass < made.positions
    exact = open_store(GOLDEN / f"v{FORMAT_VERSION}" / "chunks-plain-arrow").read(rows)
    assert np.array_equal(sizes, exact.targets.chunk_sizes)


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_store_begun_by_version_0_1_is_continued(tmp_path: Path, codec: str, store: str) -> None:
    """It keeps its format version, in which the missing shard is added to those that are there."""
    golden = GOLDEN / "v2" / f"{codec}-{store}"
    assert json.loads((GOLDEN / "v2" / "written_by.json").read_text())["coldstill"] == "0.1.0"
    shutil.copytree(golden, tmp_path / "s")
    begun = open_store(golden).manifest
    last = f"shards/{begun.shards - 1:05}"
    for path in tmp_path.glob(f"s/{last}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for left in (".lock", "claims/00001", "claims/starting", "shards/.unfinished-0-00001.arrow"):
        (tmp_path / "s" / left).parent.mkdir(exist_ok=True)  # as a killed process left them
        (tmp_path / "s" / left).touch()
    block = random_block(20, 5)  # as in tests/golden/make.py
    manifest = manifest_for(
        block, shard_sequences=begun.shard_sequences, block_sequences=2, codec=codec, store=store
    )
    manifest = fitted(replace(manifest, tokenizer=begun.tokenizer), block)
    write_missing(tmp_path / "s", manifest, block)
    before, after = digests(golden), digests(tmp_path / "s")
    assert after.keys() == before.keys()
    assert all(name.startswith(last) for name in after if after[name] != before[name])
    assert [str(problem) for problem in verify(str(tmp_path / "s"))] == []
    whole, continued = (open_store(path).read(np.arange(5)) for path in (golden, tmp_path / "s"))
    assert np.array_equal(whole.targets.head_ids, continued.targets.head_ids)
    changed = replace(manifest, capture=replace(manifest.capture, seed=99))
    with pytest.raises(
        ColdstillError, match=r"made differently: capture\.seed: 7 in the store, 99"
    ):
        ShardWriter(tmp_path / "s", changed).check()


def assert_same(found: Any, wanted: Any, name: str) -> None:
    if wanted is None:
        assert found is None, name
    elif isinstance(found, Ragged):
        assert [row.tolist() for row in found] == wanted, name
    elif found.dtype.kind == "f":
        # a table of logarithms may differ in the last digit from one machine to another
        np.testing.assert_allclose(found, np.array(wanted, np.float32), rtol=1e-6, atol=1e-6)
    else:
        assert found.tolist() == wanted, name


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_store_of_version_2_becomes_one_of_the_present_version(
    tmp_path: Path, codec: str, store: str
) -> None:
    """No number is rounded again, and its statistics stay."""
    old = GOLDEN / "v2" / f"{codec}-{store}"
    manifest = convert(str(old), str(tmp_path / "new"), None, None)
    assert manifest.version == FORMAT_VERSION
    assert ("frequent" in manifest.codec) == (codec == "compact")
    ours, theirs = open_store(tmp_path / "new"), open_store(old)
    rows = np.arange(len(theirs))
    found, wanted = ours.read(rows), theirs.read(rows)
    assert_alike(numbers(found.sequences), numbers(wanted.sequences))
    for part in (found, wanted):  # heads of equal levels are in another order
        order = np.argsort(part.targets.head_ids, axis=1)
        for name in ("head_ids", "head_logprobs"):
            array = getattr(part.targets, name)
            array[:] = np.take_along_axis(array, order, axis=1)
    assert_alike(numbers(found.targets), numbers(wanted.targets))
    assert ours.statistics == theirs.statistics
    assert [str(problem) for problem in verify(str(tmp_path / "new"))] == []


def assert_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_equal(found[name], value, name)
