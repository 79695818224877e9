"""Compressed files that are complete, and some that only seem damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import zipfile
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError

if TYPE_CHECKING:
    from pathlib import Path

LINE = b'{"text": "a"}\n'
MAGIC = b"\x28\xb5\x2f\xfd"
LARGE_WINDOW = (
    MAGIC
    + b"\x00"  # no checksum, the size of the content is not told
    + bytes([(31 - 10) << 3])  # a window of 2 ** 31 bytes
    + (len(LINE) << 3 | 1).to_bytes(3, "little")  # one last block, not compressed
    + LINE
)
"""What `zstd --ultra --long=31` makes of a stream (RFC 8878)."""


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def refusal(base: Path, name: str, data: bytes) -> str:
    (base / name).write_bytes(data)
    with pytest.raises(ColdstillError) as caught:
        list(read_documents(list_sources([name], base), Columns()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.parquet.zst", "a.arrow.zst"])
def test_a_window_that_is_too_large_is_reported(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, name, LARGE_WINDOW) == (
        f"{name}: cannot be read: it was compressed with a window of 2,147,483,648 bytes (zstd "
        "--long=28 or more), larger than the 134,217,728 bytes that are read; compress it again "
        "with zstd --long=27"
    )


def test_a_large_window_in_a_later_frame_is_reported(tmp_path: Path) -> None:
    told = refusal(tmp_path, "a.jsonl.zst", zstd(LINE) + LARGE_WINDOW)
    assert "it was compressed with a window (zstd --long=28 or more), larger than" in told


def test_the_largest_allowed_window_is_read(tmp_path: Path) -> None:
    small = LARGE_WINDOW[:5] + bytes([(27 - 10) << 3]) + LARGE_WINDOW[6:]
    (tmp_path / "a.jsonl.zst").write_bytes(small)
    (document,) = read_documents(list_sources(["a.jsonl.zst"], tmp_path), Columns())
    assert document.text == "a"


def test_frames_without_data_are_skipped(tmp_path: Path) -> None:
    part = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    (tmp_path / "a.jsonl.zst").write_bytes(part + zstd(LINE) + part + zstd(LINE) + part)
    documents = read_documents(list_sources(["a.jsonl.zst"], tmp_path), Columns())
    assert [document.text for document in documents] == ["a", "a"]
    for data in (zstd(LINE) + b"more", part + zstd(LINE)[:-3]):
        told = refusal(tmp_path, "a.jsonl.zst", data)
        assert told.endswith("it is cut short or damaged, fetch or write it again")


def test_a_wrong_compression_suffix_is_reported(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    for data, kind in [
        (bz2.compress(LINE), "with bzip2"),
        (packed.getvalue(), "with zip"),
        (zstd(LINE), "with zstd"),
        (LINE * 9, "of another kind or not at all"),
    ]:
        assert refusal(tmp_path, "a.jsonl.gz", data) == (
            f"a.jsonl.gz: cannot be read: it is not compressed with gzip but {kind}; rename it"
        )


def test_compressed_text_without_a_suffix_is_reported(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        told = refusal(tmp_path, name, gzip.compress(LINE))
        assert told == f"{name}: is compressed with gzip; name it {name}.gz"
        told = refusal(tmp_path, name, bz2.compress(LINE))
        assert told == f"{name}: is compressed with bzip2; unpack it first"
    told = refusal(tmp_path, "a.jsonl.gz", gzip.compress(zstd(LINE)))
    assert told == "a.jsonl.gz: is compressed with zstd once more; unpack it first"


def test_a_compressed_empty_file_holds_no_records(tmp_path: Path) -> None:
    for name, data in [("a.jsonl.gz", gzip.compress(b"")), ("a.jsonl.zst", zstd(b""))]:
        assert refusal(tmp_path, name, data).startswith(f"{name}: holds no records;")
