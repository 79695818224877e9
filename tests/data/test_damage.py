"""Every damaged byte of a store is found, and never read as data."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.formats import STORES
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Block
from coldstill.data.store.reader import open_store
from oracles import as_stored, numbers, random_block, whole_store

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

KINDS = list(itertools.product(sorted(STORES), sorted(CODECS)))
BLOCK = random_block(0, 5)
SIZES: dict[str, Any] = {"shard_sequences": 3, "block_sequences": 2}
"""Two shards, one of them with two blocks."""
DAMAGES = 120
"""Number of damages for each kind of store."""


def same(found: Block, wanted: Block) -> bool:
    """Whether two blocks are equal bit for bit."""
    return as_bytes(found) == as_bytes(wanted)


def as_bytes(block: Block) -> list[tuple[Any, ...]]:
    parts = [*numbers(block.sequences).values(), *numbers(block.targets).values()]
    arrays = [a for part in parts for a in (part if isinstance(part, tuple) else [part])]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def damaged(random: np.random.Generator, whole: bytes) -> bytes:
    """One bit flipped, or, one time in four, the end cut off."""
    place = int(random.integers(len(whole)))
    if random.random() < 0.25:
        return whole[:place]
    changed = bytearray(whole)
    changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


def assert_found(root: Path, shard: int | None) -> None:
    problems = list(verify(str(root)))
    assert problems
    assert {problem.shard for problem in problems} == {shard}
    assert all("\n" not in str(problem) for problem in problems)


def assert_never_wrong(root: Path, wanted: Block) -> None:
    found: list[Block] = []
    try:
        found.extend(open_store(root).batches(2))
    except ColdstillError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
        return
    assert same(Block.concatenate(found), wanted)


@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_any_flipped_bit_or_truncation_is_found_and_never_read(
    tmp_path: Path, store: str, codec: str
) -> None:
    whole_store(tmp_path, BLOCK, store=store, codec=codec, **SIZES)
    wanted = as_stored(BLOCK, codec)
    assert list(verify(str(tmp_path))) == []
    assert same(open_store(tmp_path).read(np.arange(len(BLOCK))), wanted)
    records = sorted(tmp_path.glob("shards/*.json"))
    data = [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    kinds = [[tmp_path / "manifest.json"], records, sorted(set(data) - set(records))]
    random = np.random.default_rng([0, *map(ord, store + codec)])
    for number in range(DAMAGES):
        files = kinds[number % 3]
        path = files[int(random.integers(len(files)))]
        whole = path.read_bytes()
        path.write_bytes(damaged(random, whole))
        shard = None if number % 3 == 0 else int(path.relative_to(tmp_path).parts[1][:5])
        assert_found(tmp_path, shard)
        assert_never_wrong(tmp_path, wanted)
        path.write_bytes(whole)
    assert list(verify(str(tmp_path))) == []


@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_any_missing_file_is_found_and_never_read(tmp_path: Path, store: str, codec: str) -> None:
    whole_store(tmp_path, BLOCK, store=store, codec=codec, **SIZES)
    for path in sorted((tmp_path / "shards").rglob("*")):
        if path.is_dir():
            continue
        whole = path.read_bytes()
        path.unlink()
        problems = list(verify(str(tmp_path)))
        shard = int(path.relative_to(tmp_path).parts[1][:5])
        assert shard in {problem.shard for problem in problems}
        is_record = path.parent.name == "shards" and path.suffix == ".json"
        assert any(problem.missing for problem in problems) is is_record
        with pytest.raises(ColdstillError):
            open_store(tmp_path).read(np.arange(len(BLOCK)))
        path.write_bytes(whole)
    (tmp_path / "manifest.json").unlink()
    for refused in (lambda: list(verify(str(tmp_path))), lambda: open_store(tmp_path)):
        with pytest.raises(ColdstillError, match=r"no manifest\.json there"):
            refused()
