"""The compiled loops of `compact` decode to the same bits as numpy, and are never needed."""

from __future__ import annotations

import importlib.util
import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.codecs.compact import compiled
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Capture, Tail
from coldstill.data.store.reader import open_store
from oracles import (
    CAPTURES,
    as_bytes,
    compiled_at_once,
    digest,
    everything,
    random_block,
    random_record,
    whole_store,
    with_targets,
)
from oracles import (
    draws as every_draw,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstill.data.codecs import Codec
    from coldstill.data.columns import Columns

GOLDEN = Path(__file__).parents[1] / "golden"
STORED = sorted(path.parent for path in GOLDEN.glob("v3/compact-*/manifest.json"))
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Whether numba can be used is found out anew."""
    compiled._loaded.cache_clear()
    yield
    compiled._loaded.cache_clear()


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose what decodes: `numpy` or `numba`."""

    def choose(name: str) -> None:
        worth = {"numpy": 1 << 60, "numba": 0}[name]
        monkeypatch.setattr(compiled, "WORTHWHILE", worth)
        assert (compiled.loops(0) is None) is (name == "numpy")

    return choose


def assert_decoded_alike(
    codec: Codec, columns: Columns, capture: Capture, decoders: Callable[[str], None]
) -> None:
    found = []
    for name in ("numpy", "numba"):
        decoders(name)
        found.append(as_bytes(codec.decode(columns, capture)))
    for name, wanted in found[0].items():
        assert found[1][name] == wanted, name


@needs_numba
@pytest.mark.parametrize("capture", CAPTURES.values(), ids=list(CAPTURES))
def test_both_decoders_give_the_same_bits(
    capture: Capture, decoders: Callable[[str], None]
) -> None:
    for count in (0, 1, 9):
        block = random_block(count, max(1, count), capture).take(np.arange(count))
        codec = CODECS["compact"].fitting(vocabulary=40, capture=capture).learned(block)
        assert_decoded_alike(codec, codec.encode(block), capture, decoders)


@needs_numba
@pytest.mark.parametrize("vocabulary", [300, 65_536, 65_537, 2**20])
@pytest.mark.parametrize(("head", "draws"), [(50, 0), (0, 50), (5, 300), (16, 16)])
def test_both_decoders_give_the_same_bits_at_any_vocabulary(
    vocabulary: int, head: int, draws: int, decoders: Callable[[str], None]
) -> None:
    """Labels are anywhere in their records, or nowhere, and counts take one byte or two."""
    capture = Capture(head=head, tail=draws)
    kinds, count = min(draws, 40), 300
    targets = random_record(vocabulary, count, Capture(head=head, tail=kinds))
    random = np.random.default_rng(vocabulary)
    if draws:
        columns_MR = random.integers(0, random.integers(1, kinds + 1, (count, 1)), (count, draws))
        drawn_MR = np.take_along_axis(every_draw(targets.tail), columns_MR, axis=1)
        targets = replace(targets, tail=Tail.from_draws(drawn_MR))
    block = with_targets(targets, capture)
    offsets = targets.tail.offsets
    for m in np.flatnonzero(random.random(count) < 0.8):
        own = targets.tail.ids[offsets[m] : offsets[m + 1]]
        label = random.choice(np.concatenate([targets.head_ids[m], own]))
        block.sequences.tokens.values[m + 1] = label
    codec = CODECS["compact"].fitting(vocabulary=vocabulary, capture=capture)
    codes = set()
    for each in (codec, codec.learned(block)):
        columns = each.encode(block)
        code: Any = columns["label_code"]
        codes |= set(code.values.tolist())
        assert_decoded_alike(each, columns, capture, decoders)
    assert len(codes) > 5


@needs_numba
@pytest.mark.parametrize("root", STORED, ids=lambda p: p.name)
def test_golden_stores_are_read_alike(root: Path, decoders: Callable[[str], None]) -> None:
    """From the disk: arrays that cannot be written, and two formats."""
    found = []
    for name in ("numpy", "numba"):
        decoders(name)
        found.append(as_bytes(everything(root)))
        problems = [str(problem) for problem in verify(str(root))]
        assert [p for p in problems if "tokenizer: missing" not in p] == []
    assert found[0] == found[1]


@needs_numba
def test_a_process_changes_to_the_loops_when_it_has_decoded_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_store(tmp_path, random_block(0, 9), codec="compact", shard_sequences=9, block_sequences=1)
    store = open_store(tmp_path)
    used = []
    load = compiled._loaded

    def loaded() -> Any:
        used.append(compiled._decoded)
        return load()

    monkeypatch.setattr(compiled, "_loaded", loaded)
    monkeypatch.setattr(compiled, "_decoded", 0)
    monkeypatch.setattr(compiled, "WORTHWHILE", store.positions // 2)
    wanted = as_bytes(everything(tmp_path))
    assert store.positions // 2 <= used[0] <= store.positions
    assert len(used) < 9
    assert as_bytes(everything(tmp_path)) == wanted


def test_numpy_decodes_where_numba_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "WORTHWHILE", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to say
        assert compiled.loops(1) is None
        whole_store(tmp_path, random_block(0, 5), codec="compact")
        assert len(everything(tmp_path)) == 5


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_numba_that_cannot_be_used_is_said_once_and_numpy_decodes(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A numba for another numpy, or no folder for what it compiles."""

    def fails(name: str) -> Any:
        raise error(f"{name} needs NumPy 1.0\nor less")

    monkeypatch.setattr(compiled, "WORTHWHILE", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.warns(UserWarning, match="numba .* cannot be used, so numpy decodes: ") as said:
        assert [compiled.loops(1) for _ in range(3)] == [None] * 3
    assert len(said) == 1
    assert str(said[0].message).endswith("loops needs NumPy 1.0")


@needs_numba
@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
def test_threads_and_processes_decode_alike(
    tmp_path: Path, decoders: Callable[[str], None], start: str
) -> None:
    """As the workers of a loader do, forked after the loops are loaded, or started anew."""
    whole_store(tmp_path, random_block(0, 9), codec="compact", shard_sequences=9)
    decoders("numpy")
    wanted = digest(tmp_path)
    decoders("numba")
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(digest, [tmp_path] * 16)) == {wanted}
    context: Any = multiprocessing.get_context(start)
    with context.Pool(2, initializer=compiled_at_once) as processes:
        assert set(processes.map(digest, [tmp_path] * 4)) == {wanted}
