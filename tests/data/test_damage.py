"""Every damaged byte of a store is found, and never read as data."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.files import tokens_sha256
from coldstill.data.formats import STORES
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Block, Ragged, Sequences, Targets
from coldstill.data.store.manifest import TokenizerIdentity
from coldstill.data.store.reader import open_store
from oracles import VOCABULARY, manifest_for, random_block, write_missing
from tokenizers import Tokenizer, models

if TYPE_CHECKING:
    from pathlib import Path

KINDS = list(itertools.product(sorted(STORES), sorted(CODECS)))
BLOCK = random_block(0, 5)
DAMAGES = 120
"""Number of damages for each kind of store."""


def make(root: Path, store: str, codec: str, block: Block = BLOCK) -> None:
    """A whole store of two shards, one of them with two blocks."""
    table = {f"word{index}": index for index in range(VOCABULARY)}
    (root / "tokenizer").mkdir()
    model: Any = models.WordLevel(table, unk_token="word0")
    Tokenizer(model).save(str(root / "tokenizer" / "tokenizer.json"))
    manifest = manifest_for(block, shard_sequences=3, block_sequences=2, store=store, codec=codec)
    named = TokenizerIdentity(fingerprint=tokens_sha256(table), size=VOCABULARY)
    write_missing(root, replace(manifest, tokenizer=named), block)


def as_stored(codec: str) -> Block:
    made = CODECS[codec].fitting(vocabulary=VOCABULARY, capture=BLOCK.capture)
    return made.decode(made.encode(BLOCK), BLOCK.capture)


def same(found: Block, wanted: Block) -> bool:
    """Whether two blocks are equal bit for bit."""
    for kind, part in ((Sequences, "sequences"), (Targets, "targets")):
        for f in fields(kind):
            one: Any = getattr(getattr(found, part), f.name)
            other: Any = getattr(getattr(wanted, part), f.name)
            if isinstance(other, Ragged):
                if one.offsets.tolist() != other.offsets.tolist():
                    return False
                one, other = one.values, other.values
            if (one.dtype, one.shape, one.tobytes()) != (other.dtype, other.shape, other.tobytes()):
                return False
    return True


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
    make(tmp_path, store, codec)
    wanted = as_stored(codec)
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
    make(tmp_path, store, codec)
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


@pytest.mark.parametrize(("shard", "row"), [(0, 1), (0, 2), (1, 4)])
def test_a_wrong_number_with_a_valid_checksum_is_reported_with_its_place(
    tmp_path: Path, shard: int, row: int
) -> None:
    positions = BLOCK.sequences.positions
    place = int(positions.offsets[row])
    assert place < positions.offsets[row + 1]
    entropy = BLOCK.targets.entropy.copy()
    entropy[place] = -1.0
    broken = replace(BLOCK, targets=replace(BLOCK.targets, entropy=entropy))
    make(tmp_path, "arrow", "plain", broken)
    (problem,) = verify(str(tmp_path))
    where = f"shard {shard}, sequence {row}, position {positions.values[place]}"
    assert str(problem) == f"{where}: an entropy that is not in [0, log V]"


def test_tokens_with_another_hash_are_reported_with_their_place(tmp_path: Path) -> None:
    hashes = BLOCK.sequences.hashes.copy()
    hashes[4] += np.uint64(1)
    broken = replace(BLOCK, sequences=replace(BLOCK.sequences, hashes=hashes))
    make(tmp_path, "arrow", "plain", broken)
    (problem,) = verify(str(tmp_path))
    assert str(problem).startswith("shard 1, sequence 4: sequence 4 is not what was written")
