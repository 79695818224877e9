from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import write_json
from coldstill.data.formats.arrow import ArrowStore
from coldstill.data.prepared import (
    BLOCK_SEQUENCES,
    SPLITS,
    CorpusLayout,
    CorpusRecord,
    SequenceFile,
    SequenceWriter,
    SplitRecord,
    TokenizedDocument,
    build_sequences,
)
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Sequences

COUNTS = [1, 2, BLOCK_SEQUENCES - 1, BLOCK_SEQUENCES, BLOCK_SEQUENCES + 1, 3 * BLOCK_SEQUENCES + 5]


def packed(count: int) -> list[list[TokenizedDocument]]:
    random = np.random.default_rng(count)
    sizes = random.integers(2, 9, count)
    return [
        [TokenizedDocument(i, random.integers(0, 99, s).astype(np.int32), random.random(s) < 0.8)]
        for i, s in enumerate(sizes)
    ]


def write(path: Path, sequences: list[list[TokenizedDocument]]) -> tuple[SequenceWriter, str]:
    with ArrowStore().create(path) as add:
        writer = SequenceWriter(add)
        for pieces in sequences:
            writer.add(pieces)
        return writer, writer.finish()


Row = tuple[int, list[int], list[int], list[int], int]


def content(sequences: Sequences) -> list[Row]:
    return [
        (
            int(sequences.ids[row]),
            sequences.tokens[row].tolist(),
            sequences.document_ids[row].tolist(),
            sequences.positions[row].tolist(),
            int(sequences.hashes[row]),
        )
        for row in range(len(sequences))
    ]


def read_or_refusal(path: Path) -> tuple[list[Row], str | None]:
    try:
        return [row for batch in SequenceFile(path).batches(64) for row in content(batch)], None
    except ColdstillError as error:
        return [], str(error)


@pytest.mark.parametrize("count", COUNTS)
def test_sequences_are_counted_hashed_and_read_across_the_borders_of_blocks(
    tmp_path: Path, count: int
) -> None:
    source = packed(count)
    writer, digest = write(tmp_path / "train.arrow", source)
    whole = build_sequences(0, source)
    assert writer.sequences == count
    assert writer.tokens == len(whole.tokens.values)
    assert writer.positions == len(whole.positions.values)
    assert digest == hashlib.sha256(whole.hashes.astype("<u8").tobytes()).hexdigest()
    _, other = write(tmp_path / "other.arrow", [*source[:-1], *packed(1)])
    assert other != digest or count == 1
    file, expected = SequenceFile(tmp_path / "train.arrow"), content(whole)
    assert len(file) == count
    random = np.random.default_rng(0)
    for rows in (np.arange(count), np.arange(count)[::-1], random.integers(0, count, 200)):
        assert content(file.read(rows)) == [expected[row] for row in rows]
    for size in (1, 7, 1000):
        found = [row for batch in file.batches(size) for row in content(batch)]
        assert found == expected
    for wrong in ([], [-1], [count], [0, 10**9]):
        with pytest.raises(IndexError):
            file.read(np.array(wrong, dtype=np.int64))


def test_damage_is_reported_in_one_line_or_changes_no_token(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    source = packed(70)
    write(path, source)
    whole = path.read_bytes()
    expected = content(build_sequences(0, source))
    random = np.random.default_rng(0)
    found = 0
    for place in random.integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.unlink()  # the old file may still be mapped
        path.write_bytes(damaged)
        rows, refused = read_or_refusal(path)
        if refused is None:  # what a hash covers is what was written
            assert [(r[1], r[3]) for r in rows] == [(r[1], r[3]) for r in expected]
        else:
            found += 1
            assert refused.startswith(f"{path}: ")
            assert "\n" not in refused
    assert found > 100
    path.unlink()
    path.write_bytes(whole[:-20])
    with pytest.raises(ColdstillError, match=r"train\.arrow: not a whole Arrow file"):
        SequenceFile(path)


def record() -> CorpusRecord:
    split = SplitRecord(
        documents=1, bytes=2, sequences=3, tokens=4, positions=5, content="a", packing="b"
    )
    return CorpusRecord(
        settings={"files": ["x"], "holdout": 0.1},
        sources=[["x", 10, 20]],
        together=True,
        separator=[0],
        splits=dict.fromkeys(SPLITS, split),
        counts={"empty_documents": 0},
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    layout = CorpusLayout(tmp_path)
    assert layout.read_record() is None
    counts = {"empty_documents": 5, "too_long_prompts": 2, "unrenderable_chats": 1}
    for written in (record(), replace(record(), prompts=True, counts=counts)):
        write_json(layout.record, asdict(written))
        assert layout.read_record() == written
    assert (written.skipped, record().skipped) == (3, 0)
    old = asdict(record())
    assert old.pop("prompts") is False  # that of an earlier version is one of texts
    write_json(layout.record, old)
    assert layout.read_record() == record()
    for split, count in zip(SPLITS, (3, 2), strict=True):
        write(layout.split(split), packed(count))
    assert [len(layout.open(split)) for split in SPLITS] == [3, 2]


def test_a_damaged_record_names_the_folder_to_delete(tmp_path: Path) -> None:
    layout = CorpusLayout(tmp_path)
    changes: tuple[dict[str, Any], ...] = (
        {"splits": {"train": {}}}, {"separator": "x"}, {"weather": "fine"}
    )  # fmt: skip
    for change in changes:
        layout.record.write_text(json.dumps(asdict(record()) | change))
        message = refusal(layout.read_record)
        assert message.startswith(f"{layout.record}: damaged")
        assert f"delete the folder {tmp_path}" in message
