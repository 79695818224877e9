"""Stores of earlier versions: every value stays readable, and an incomplete one is continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.formats import STORES
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Ragged
from coldstill.data.store.manifest import FORMAT_VERSION
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter, with_error
from oracles import digests, manifest_for, random_block, write_missing

GOLDEN = Path(__file__).parents[1] / "golden"
STORED = sorted(path.parent for path in GOLDEN.glob("v*/*/manifest.json"))


@pytest.mark.parametrize("root", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_golden_store_is_whole_and_holds_the_same_values(root: Path) -> None:
    expected = json.loads(root.with_name(f"{root.name}.json").read_text())
    store = open_store(root)
    block = store.read(np.arange(len(store)))
    for name, wanted in expected.items():
        part = block.sequences if hasattr(block.sequences, name) else block.targets
        assert_same(getattr(part, name), wanted, name)
    assert len(expected) == 14
    assert [str(problem) for problem in verify(str(root))] == []


def test_there_is_a_golden_store_of_each_codec_and_format() -> None:
    names = {root.name for root in STORED if root.parent.name == f"v{FORMAT_VERSION}"}
    assert names == {f"{codec}-{store}" for codec in CODECS for store in STORES}


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_a_store_begun_by_version_0_1_is_continued(tmp_path: Path, codec: str) -> None:
    """The format version is the same, so the missing shard is added to those that are there."""
    golden = GOLDEN / "v2" / f"{codec}-arrow"
    assert json.loads((GOLDEN / "v2" / "written_by.json").read_text())["coldstill"] == "0.1.0"
    shutil.copytree(golden, tmp_path / "s")
    for path in (tmp_path / "s" / "shards").glob("00001.*"):
        path.unlink()
    for left in (".lock", "claims/00001", "claims/starting", "shards/.unfinished-0-00001.arrow"):
        (tmp_path / "s" / left).parent.mkdir(exist_ok=True)  # as a killed process left them
        (tmp_path / "s" / left).touch()
    block = random_block(20, 5)  # as in tests/golden/make.py
    manifest = manifest_for(block, shard_sequences=3, block_sequences=2, codec=codec)
    begun = open_store(golden).manifest
    manifest = with_error(replace(manifest, tokenizer=begun.tokenizer), block)
    write_missing(tmp_path / "s", manifest, block)
    before, after = digests(golden), digests(tmp_path / "s")
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} <= {
        "shards/00001.arrow",
        "shards/00001.json",
    }
    assert [str(problem) for problem in verify(str(tmp_path / "s"))] == []
    whole, continued = (open_store(path).read(np.arange(5)) for path in (golden, tmp_path / "s"))
    assert np.array_equal(whole.targets.head_ids, continued.targets.head_ids)
    changed = replace(manifest, capture=replace(manifest.capture, seed=99))
    with pytest.raises(
        ColdstillError, match=r"made differently: capture\.seed: 7 in the store, 99"
    ):
        ShardWriter(tmp_path / "s", changed).check()


def assert_same(found: Any, wanted: Any, name: str) -> None:
    if isinstance(found, Ragged):
        assert [row.tolist() for row in found] == wanted, name
    elif found.dtype.kind == "f":
        # a table of logarithms may differ in the last digit from one machine to another
        np.testing.assert_allclose(found, np.array(wanted, np.float32), rtol=1e-6, atol=1e-6)
    else:
        assert found.tolist() == wanted, name
