"""Writes a store in the formats of other projects, for people whose trainers read those.

Both formats keep the head alone. Samples, which make a record unbiased, have no place in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ColdstillError
from ..files import json_bytes, whole_folder
from ..imports.bits import id_bits
from . import Notify, no_progress
from .rewrite import open_original

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..schema import Block
    from ..store.manifest import Manifest

_SEQUENCES = 64
"""Sequences of a row group."""


def export(
    path: str, to: str, kind: str, *, lossy: bool = False, notify: Notify = no_progress
) -> int:
    """Write a store as a folder that another project reads; one row per document.

    path   the store
    to     a new folder
    kind   a name of `KINDS`
    lossy  write the head of a store that also has samples, or further temperatures

    Returns the number of rows.

    Raises
        ColdstillError: the format would lose what makes the record unbiased, the store has no head,
            or the folder exists
    """
    store = open_original(path, to)
    capture = store.manifest.capture
    if capture.head == 0:
        raise ColdstillError(
            f"{path}: keeps no head, only samples, and {kind} has no place for samples; it cannot "
            "be written"
        )
    if capture.tail and not lossy:
        raise ColdstillError(
            f"{path}: {kind} has no place for its {capture.tail} samples of a position, which make "
            "the record unbiased; to write the head alone, add --lossy"
        )
    if capture.temperatures and not lossy:
        kept = ", ".join(map(str, capture.temperatures))
        raise ColdstillError(
            f"{path}: {kind} has no place for what makes its temperatures exact ({kept}); to write "
            "the head alone, add --lossy"
        )
    if Path(to).exists():
        raise ColdstillError(f"{to}: exists already; choose another folder")
    write_rows, config = KINDS[kind]
    done = written = 0
    with whole_folder(Path(to)) as scratch:
        with _Table(scratch / "data.parquet") as table:
            for block in store.batches(_SEQUENCES):
                written += table.add(write_rows(block, store.manifest))
                done += len(block)
                notify("convert", done, len(store))
        if config is not None:
            (scratch / "compression_config.json").write_bytes(json_bytes(config(store.manifest)))
    return written


class _Table:
    """A Parquet file that grows by row groups."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, columns: dict[str, Any]) -> int:
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        return int(table.num_rows)


def _documents(block: Block) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Tokens of each document, its supervised positions, and their rows among the targets."""
    sequences = block.sequences
    for index in range(len(block)):
        tokens = sequences.tokens[index]
        starts = sequences.document_starts[index].tolist()
        first, last = sequences.positions.offsets[index : index + 2].tolist()
        positions, rows = sequences.positions[index], np.arange(first, last)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            own = (positions >= start) & (positions < stop)
            yield tokens[start:stop], positions[own] - start, rows[own]


def _distillkit(block: Block, manifest: Manifest) -> dict[str, Any]:
    """Rows of DistillKit; it has no mask, so that every token but the last needs a target."""
    head, bits = manifest.capture.head, id_bits(manifest.tokenizer.size)
    tokens, values, ids = [], [], []
    for token_T, position_M, row_M in _documents(block):
        if len(position_M) != len(token_T) - 1:
            raise ColdstillError(
                f"distillkit has no mask, but a document of {len(token_T)} tokens has "
                f"{len(position_M)} supervised positions; write axolotl, which has one"
            )
        tokens.append(token_T.astype(np.uint64))
        logprobs = block.targets.head_logprobs[row_M].astype("<f4")
        values.append(np.ascontiguousarray(logprobs).view(np.uint8).reshape(-1, 4 * head))
        shifts = np.arange(bits - 1, -1, -1)
        each = (block.targets.head_ids[row_M][:, :, None] >> shifts) & 1
        ids.append(np.packbits(each.reshape(len(row_M), -1).astype(np.uint8), axis=1))
    return {
        "input_ids": pa.array(tokens, pa.list_(pa.uint64())),
        "compressed_logprobs": _nested(values, pa.uint8()),
        "bytepacked_indices": _nested(ids, pa.uint8()),
    }


def _distillkit_config(manifest: Manifest) -> dict[str, Any]:
    head = manifest.capture.head
    return {
        "d": manifest.tokenizer.size, "k": head, "exact_k": head, "exact_dtype": "float32",
        "polynomial_terms": [], "term_dtype": "float32", "residual_bins": [],
        "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip


def _axolotl(block: Block, manifest: Manifest) -> dict[str, Any]:
    """Prepared rows of axolotl's current code: the row of a token is about the next one."""
    head = manifest.capture.head
    columns: list[list[NDArray[Any]]] = [[] for _ in range(5)]
    for token_T, position_M, row_M in _documents(block):
        count = len(token_T)
        value = np.full((count, head), -np.inf, np.float32)
        token = np.tile(np.arange(head, dtype=np.int64), (count, 1))
        label, mask = np.full(count, -100, np.int64), np.zeros((count, head), np.int64)
        value[position_M] = block.targets.head_logprobs[row_M]
        token[position_M] = block.targets.head_ids[row_M]
        mask[position_M] = 1
        label[position_M + 1] = token_T[position_M + 1]
        parts: tuple[Any, ...] = (token_T.astype(np.int64), label, value, token, mask)
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    tokens, labels, values, ids, masks = columns
    return {
        "input_ids": pa.array(tokens, pa.list_(pa.int64())),
        "labels": pa.array(labels, pa.list_(pa.int64())),
        "attention_mask": pa.array([np.ones(len(t), np.int8) for t in tokens], pa.list_(pa.int8())),
        "target_logprobs": _nested(values, pa.float32()),
        "target_token_ids": _nested(ids, pa.int64()),
        "target_mask": _nested(masks, pa.int64()),
    }


def _nested(rows: list[NDArray[Any]], kind: Any) -> Any:
    """Matrices as a column of lists of lists."""
    flat = np.concatenate([row.ravel() for row in rows]) if rows else np.zeros(0)
    width = rows[0].shape[1] if rows else 1
    counts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(0, flat.size + 1, width), pa.int32()), pa.array(flat, kind)
    )
    return pa.ListArray.from_arrays(pa.array(counts, pa.int32()), inner)


KINDS: dict[str, tuple[Callable[[Block, Manifest], dict[str, Any]],
                       Callable[[Manifest], dict[str, Any]] | None]] = {
    "distillkit": (_distillkit, _distillkit_config),
    "axolotl": (_axolotl, None),
}  # fmt: skip
"""How the rows of each format are written, and its file of parameters."""
