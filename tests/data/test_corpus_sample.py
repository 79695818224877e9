"""Samples of sources, with the share that was read."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.sample import sample, spread
from coldstill.data.corpus.sources import list_sources

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format; they compress about as text does."""
    base = tmp_path_factory.mktemp("sampled")
    words = np.random.default_rng(0).integers(0, 5000, (ROWS, 12)).tolist()
    rows: list[dict[str, Any]] = [{"text": " ".join(map(str, line))} for line in words]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (base / "a.jsonl").write_bytes(lines)
    (base / "a.txt").write_bytes(lines)
    (base / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (base / "a.txt.zst").write_bytes(bytes(pa.compress(lines, codec="zstd", asbytes=True)))
    (base / "a.json").write_text(json.dumps(rows, indent=1))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, base / "a.parquet")
    for name, new in {"a.arrow": pa.ipc.new_file, "s.arrow": pa.ipc.new_stream}.items():
        with new(base / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    return base


def test_the_share_predicts_the_number_of_documents(folder: Path) -> None:
    for path in folder.iterdir():
        (source,) = list_sources([path.name], folder)
        found = sample(source, Columns(), 100, 20_000)
        assert found is not None
        if source.format == "text":
            (document,) = found.documents
            size = len((folder / "a.txt").read_bytes())
            assert document.size / found.share == pytest.approx(size, rel=0.1)
        else:
            assert len(found.documents) == 100
            assert 100 / found.share == pytest.approx(ROWS, rel=0.1), path.name


def test_a_source_that_is_read_completely_has_the_share_1(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": 3}]
    (tmp_path / "a.jsonl").write_text("\r\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2) + "\n")
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("é")
    for source in list_sources(["a.*"], tmp_path):
        found = sample(source, Columns(), 100, 1000)
        assert found is not None
        assert found.share == 1.0
        texts = [document.text for document in found.documents]  # a bad row is no document
        assert texts == (["é"] if source.name == "a.txt" else ["a", "b"])


def test_a_row_longer_than_the_limit_has_no_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 5000}) + "\n" + "b" * 5000)
    (source,) = list_sources(["a.jsonl"], tmp_path)
    assert sample(source, Columns(), 100, 1000) is None


def test_the_fault_of_the_first_bad_row_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": 3}\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": 3}]')
    (tmp_path / "c.json").write_text('{"data": [{"text": "a"}]}')
    first, second, third = list_sources(["a.jsonl", "b.json", "c.json"], tmp_path)
    samples = [sample(source, Columns(), 9, 1000) for source in (first, second)]
    assert [s and (len(s.documents), s.fault[:31]) for s in samples] == [
        (1, "a.jsonl: a record is not valid "),
        (1, "b.json: column 'text' holds int"),
    ]
    assert sample(third, Columns(), 9, 1000) is None


def test_sources_are_evenly_spaced(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("a")
    sources = list_sources(["*.txt"], tmp_path)
    assert [source.name for source in spread(sources, 4)] == ["0.txt", "2.txt", "5.txt", "7.txt"]
    assert spread(sources, 99) == sources
