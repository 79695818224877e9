"""Damaged columns of `compact` are refused in one line or found by the hash, by both decoders."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs.compact import compiled
from coldstill.data.columns import check_hashes
from coldstill.data.maintenance.checks import Rules, check_block
from coldstill.data.ragged import Ragged
from coldstill.data.store.reader import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.columns import Columns
    from coldstill.data.store.reader import StoreReader

GOLDEN = Path(__file__).parents[1] / "golden" / "v3"
SAMPLES, HEADS, BOTH = "compact-arrow-0-50", "compact-arrow-8-0", "compact-arrow-5-300"
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


@pytest.fixture(params=["numpy", pytest.param("numba", marks=needs_numba)], autouse=True)
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    worth = {"numpy": 1 << 60, "numba": 0}[request.param]
    monkeypatch.setattr(compiled, "WORTHWHILE", worth)


@functools.cache
def opened(root: str) -> StoreReader:
    return open_store(GOLDEN / root)


@functools.cache
def stored(root: str) -> Columns:
    """The second block of a store: in it, every column has entries."""
    return opened(root).columns(0, 1)


def columns_of(root: str) -> Columns:
    """The same, with numbers that can be written."""
    return {
        name: Ragged(column.values.copy(), column.offsets.copy())
        if isinstance(column, Ragged)
        else column.copy()
        for name, column in stored(root).items()
    }


def entries(columns: Columns, name: str) -> np.ndarray[Any, Any]:
    """The numbers of a list column."""
    column = columns[name]
    assert isinstance(column, Ragged)
    assert len(column.values) > 0, name
    return column.values


def refused(root: str, columns: Columns) -> str:
    """Why the block is refused, in one line: by the codec, by its hash, or by the rules of
    `store verify`. Empty if it is a record."""
    manifest = opened(root).manifest
    try:
        block = manifest.make_codec(root).decode(columns, manifest.capture)
        check_hashes(block.sequences)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
        return str(error)
    rules = Rules(
        vocabulary=manifest.tokenizer.size,
        sequence_length=manifest.packing.sequence_length,
        capture=manifest.capture,
        maximum=1.0,
        rounding=1.0,
    )
    return "; ".join(finding.what for finding in check_block(block, len(block), rules))


def cut(columns: Columns, name: str) -> None:
    """Take the last entry of a list column away, also from the borders."""
    column = columns[name]
    assert isinstance(column, Ragged)
    offsets = np.minimum(column.offsets, len(column.values) - 1)
    columns[name] = Ragged(column.values[:-1], offsets)


def lists_of(name: str) -> Iterator[str]:
    yield from (f"{name}_ids_{quarter}" for quarter in range(4))
    yield from (f"{name}_ids_low", f"{name}_ids_high")


CUT = [
    *((SAMPLES, name) for name in ("tail_sizes", "tail_counts", "label_code", *lists_of("tail"))),
    *((HEADS, name) for name in ("label_code", "tail_angle", "head_levels", *lists_of("head"))),
    *((BOTH, name) for name in ("tail_sizes", "tail_counts", "tail_logprobs", *lists_of("tail"))),
]


@pytest.mark.parametrize(("root", "name"), CUT)
def test_a_column_that_is_cut_is_refused_by_its_name(root: str, name: str) -> None:
    columns = columns_of(root)
    assert refused(root, columns) == ""
    cut(columns, name)
    assert f"column '{name}' should " in refused(root, columns)


@pytest.mark.parametrize("name", ["tail_sizes", "tail_counts", "label_code", *lists_of("tail")])
@pytest.mark.parametrize("root", [SAMPLES, BOTH])
def test_flipped_bits_are_refused_or_leave_a_record(root: str, name: str) -> None:
    """Counts that still sum to R, and other ids below V, are a record: that they are not what was
    written is told by the digests of the files (`test_damage.py`)."""
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(100):
        columns = columns_of(root)
        values = entries(columns, name)
        values[random.integers(len(values))] ^= 1 << int(random.integers(8))
        outcomes.add(refused(root, columns) != "")
    assert outcomes == {True} if name == "tail_sizes" else True in outcomes


@pytest.mark.parametrize("root", [SAMPLES, BOTH])
@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "'tail_ids_sizes' holds a set without ids"), (301, "holds 301 ids of {draws} draws")],
)
def test_sizes_that_no_draws_have_are_refused(root: str, size: int, said: str) -> None:
    draws = opened(root).manifest.capture.tail
    columns = columns_of(root)
    if draws < 256 < size:
        size, said = 51, said.replace("301", "51")
    entries(columns, "tail_sizes")[2] = size
    assert said.format(draws=draws) in refused(root, columns)


def test_sizes_that_lie_about_their_ids_are_refused() -> None:
    root = SAMPLES
    for change in (1, -1):
        columns = columns_of(root)
        sizes = entries(columns, "tail_sizes")
        sizes[sizes > 1] = sizes[sizes > 1].astype(np.int64) + change
        assert "should have " in refused(root, columns)
    columns = columns_of(root)
    sizes = entries(columns, "tail_sizes")
    first, other = (int(place) for place in np.argsort(sizes)[[0, -1]])
    assert sizes[first] != sizes[other]
    sizes[[first, other]] = sizes[[other, first]]  # as many ids as before
    assert refused(root, columns) != ""


def test_counts_beyond_the_draws_or_with_another_sum_are_refused() -> None:
    root = SAMPLES
    columns = columns_of(root)
    counts = entries(columns, "tail_counts")
    counts[0] = 49
    assert "column 'tail_counts' reaches 49 of 50 draws" in refused(root, columns)
    counts[:] = 48
    assert "column 'tail_counts': those of a position do not sum to 50" in refused(root, columns)
    columns = columns_of(root)
    for name in (f"tail_ids_{quarter}" for quarter in range(4)):
        entries(columns, name)[:] &= 127  # as if every id was drawn once
    columns["tail_counts"] = Ragged(
        np.zeros(0, np.uint8),
        np.zeros_like(stored(root)["tail_counts"].offsets),  # type: ignore[union-attr]
    )
    assert "column 'tail_counts': those of a position do not sum to 50" in refused(root, columns)


@pytest.mark.parametrize("root", [SAMPLES, HEADS, BOTH])
def test_a_code_without_an_entry_is_refused(root: str) -> None:
    columns = columns_of(root)
    entries(columns, "label_code")[3] = 255
    assert refused(root, columns) == (
        "column 'label_code' names an entry that its record does not have"
    )


@pytest.mark.parametrize("root", [SAMPLES, HEADS, BOTH])
def test_a_code_that_names_another_entry_or_none_is_found_by_the_hash(root: str) -> None:
    manifest = opened(root).manifest
    codec = manifest.make_codec(root)
    wanted = codec.decode(columns_of(root), manifest.capture).sequences.tokens.values.tolist()
    found = set()
    for place in range(len(entries(columns_of(root), "label_code"))):
        for code in range(manifest.capture.head + 4):
            columns = columns_of(root)
            entries(columns, "label_code")[place] = code
            why = refused(root, columns)
            found.add(why.partition(":")[0])
            if why == "":  # the code itself, or another one of the token that was drawn most often
                tokens = codec.decode(columns, manifest.capture).sequences.tokens.values.tolist()
                assert tokens == wanted
            else:
                assert "is not what was written" in why or "'label_code' names" in why
    assert len(found) >= 2


@pytest.mark.parametrize(("root", "name"), [(SAMPLES, "tail"), (HEADS, "head"), (BOTH, "tail")])
def test_gaps_that_lead_beyond_the_vocabulary_are_refused(root: str, name: str) -> None:
    columns = columns_of(root)
    high = f"{name}_ids_high"
    entries(columns, f"{name}_ids_low")[:] = 255
    entries(columns, high)[:] = 255
    why = refused(root, columns)
    assert f"columns '{name}_ids_0' to '_3' reach rank " in why
    assert why.endswith(", not below 300000")


@pytest.mark.parametrize(("root", "name"), [(SAMPLES, "tail"), (HEADS, "head"), (BOTH, "tail")])
def test_a_gap_that_wants_another_byte_than_it_has_is_refused(root: str, name: str) -> None:
    for symbol in (127, 100, 255):
        columns = columns_of(root)
        symbols = entries(columns, f"{name}_ids_0")
        narrow = 80 if name == "tail" else 160
        place = int(np.flatnonzero((symbols & (127 if name == "tail" else 255)) < narrow)[0])
        symbols[place] = symbol if name == "tail" else 255
        why = refused(root, columns)
        assert f"column '{name}_ids_low' should have " in why or "tail_counts" in why


@pytest.mark.parametrize("root", [SAMPLES, HEADS])
def test_tokens_of_other_sequences_are_refused(root: str) -> None:
    columns = columns_of(root)
    tokens = columns["token_ids"]
    assert isinstance(tokens, Ragged)
    columns["token_ids"] = Ragged(tokens.values, np.append(tokens.offsets, tokens.offsets[-1]))
    assert "column 'token_ids' has 2 lists, expected 1" in refused(root, columns)
    columns["token_ids"] = Ragged(tokens.values.astype(np.int64), tokens.offsets)
    assert refused(root, columns) == "column 'token_ids' should be lists of uint32"
    columns["token_ids"] = tokens
    starts = entries(columns, "run_starts")
    starts[-1] = 10_000
    assert "'label_code' names labels that are not inside" in refused(root, columns)
