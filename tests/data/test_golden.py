"""What an earlier coldstill wrote stays readable, value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.formats import STORES
from coldstill.data.maintenance.verify import verify
from coldstill.data.ragged import Ragged
from coldstill.data.store.manifest import FORMAT_VERSION
from coldstill.data.store.reader import open_store

GOLDEN = Path(__file__).parents[1] / "golden"
STORED = sorted(path.parent for path in GOLDEN.glob("v*/*/manifest.json"))


@pytest.mark.parametrize("root", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_golden_store_still_has_its_content(root: Path) -> None:
    expected = json.loads(root.with_name(f"{root.name}.json").read_text())
    store = open_store(root)
    block = store.read(np.arange(len(store)))
    for name, wanted in expected.items():
        part = block.sequences if hasattr(block.sequences, name) else block.targets
        assert_same(getattr(part, name), wanted, name)
    assert len(expected) == 14


@pytest.mark.parametrize("root", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_golden_store_is_whole(root: Path) -> None:
    assert [str(problem) for problem in verify(str(root))] == []


def test_there_is_one_of_every_kind_of_this_version() -> None:
    names = {root.name for root in STORED if root.parent.name == f"v{FORMAT_VERSION}"}
    assert names == {f"{codec}-{store}" for codec in CODECS for store in STORES}


def assert_same(found: Any, wanted: Any, name: str) -> None:
    if isinstance(found, Ragged):
        assert [row.tolist() for row in found] == wanted, name
    elif found.dtype.kind == "f":
        # a table of logarithms may differ in the last digit from one machine to another
        np.testing.assert_allclose(found, np.array(wanted, np.float32), rtol=1e-6, atol=1e-6)
    else:
        assert found.tolist() == wanted, name
