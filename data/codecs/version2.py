"""The codecs of format version 2, whose samples are R ids for each position, with repeats.

They read stores of that version and complete those that were begun in it. New stores have the
present version; `coldstill store convert` makes one of an old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..columns import expect_column, from_positions, from_sequences, to_positions, to_sequences
from ..ragged import Ragged
from ..schema import Block, Capture, Tail, Targets, target_shapes
from .compact.codec import CompactCodec
from .compact.rounding import from_steps, log_masses, row_blocks, to_angle, to_steps, widest_angle
from .compact.runs import from_runs, to_runs
from .plain import PlainCodec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..columns import Columns


@dataclass(frozen=True, slots=True)
class PlainVersion2(PlainCodec):
    """One entry for each draw."""

    def encode(self, block: Block) -> Columns:
        targets, positions = block.targets, block.sequences.positions
        arrays = {name: getattr(targets, name) for name in target_shapes(block.capture, 0)}
        ids, known = _draws(targets.tail, block.capture)
        arrays["tail_ids"] = ids
        if known is not None:
            arrays["tail_logprobs"] = known
        wide = {name: array for name, array in arrays.items() if 0 not in array.shape[1:]}
        return from_sequences(block.sequences) | from_positions(wide, positions)

    def decode(self, columns: Columns, capture: Capture) -> Block:
        sequences = to_sequences(columns)
        arrays = to_positions(columns, sequences.positions)
        count = len(sequences.positions.values)
        shapes = target_shapes(capture, count)
        dense = {name: expect_column(arrays, name, *shape) for name, shape in shapes.items()}
        tail = _tail(arrays, capture, count, np.int32, np.float32)
        return Block(sequences=sequences, targets=Targets(**dense, tail=tail), capture=capture)


@dataclass(frozen=True, slots=True)
class CompactVersion2(CompactCodec):
    """Ids as sorted differences, and every label and entropy on its own."""

    largest: ClassVar[int] = 1 << 24

    def learned(self, block: Block) -> CompactVersion2:
        return self

    def _encode(self, block: Block, levels_MK: NDArray[np.uint8]) -> Columns:
        sequences, targets, capture = block.sequences, block.targets, block.capture
        id_type = self._id_type
        arrays: dict[str, NDArray[Any]] = {}
        if capture.head:
            ids, levels = self._levels.by_id(targets.head_ids, levels_MK)
            arrays |= {"head_ids": _differences(ids, id_type), "head_levels": levels}
        arrays["tail_angle"] = to_angle(targets.log_tail, capture.head)
        draws, known = _draws(targets.tail, capture)
        if capture.tail:
            arrays["tail_ids"] = _differences(draws, id_type)
        if known is not None:
            arrays["tail_logprobs"] = to_steps(-known, "-tail_logprobs")
        arrays["label_logprob"] = to_steps(-targets.label_logprob, "-label_logprob")
        arrays["entropy"] = to_steps(targets.entropy, "entropy")
        if capture.temperatures:
            arrays["log_norm"] = targets.log_norm
        starts, lengths = to_runs(sequences.positions)
        own: Columns = {
            "token_ids": Ragged(sequences.tokens.values.astype(id_type), sequences.tokens.offsets),
            "document_starts": sequences.document_starts,
            "document_ids": sequences.document_ids,
            "run_starts": starts,
            "run_lengths": lengths,
            "sequence_hash": sequences.hashes,
        }
        return {"sequence_id": sequences.ids} | own | from_positions(arrays, sequences.positions)

    def _decode(self, columns: Columns, capture: Capture) -> tuple[Block, NDArray[np.uint8]]:
        stored: dict[str, Any] = columns
        positions = from_runs(stored["run_starts"], stored["run_lengths"])
        count, id_type = len(positions.values), self._id_type
        arrays = to_positions(columns, positions)
        shapes = target_shapes(capture, count)

        def column(name: str, dtype: Any, field: str | None = None) -> NDArray[Any]:
            return expect_column(arrays, name, shapes[field or name][0], dtype)

        angle = column("tail_angle", np.uint16, "log_tail")
        if angle.max(initial=0) > widest_angle(capture.head):
            raise ValueError(f"column 'tail_angle' reaches {angle.max()}, beyond a right angle")
        log_tail, log_head = log_masses(angle)
        levels = column("head_levels", np.uint8, "head_ids")
        ids, levels = self._levels.most_probable_first(
            _cumulated(column("head_ids", id_type)), levels
        )
        targets = Targets(
            head_ids=ids,
            head_logprobs=self._levels.logprobs(levels, log_head, self._levels.sums(levels)),
            log_tail=log_tail,
            tail=_tail(arrays, capture, count, id_type, np.uint16),
            label_logprob=from_steps(column("label_logprob", np.uint16), -1),
            entropy=from_steps(column("entropy", np.uint16), 1),
            log_norm=column("log_norm", np.float32),
        )
        tokens = Ragged(stored["token_ids"].values.astype(np.int32), stored["token_ids"].offsets)
        sequences = to_sequences(columns | {"token_ids": tokens, "positions": positions})
        return Block(sequences=sequences, targets=targets, capture=capture), levels


def _tail(
    arrays: dict[str, NDArray[Any]], capture: Capture, count: int, id_type: Any, known_type: Any
) -> Tail:
    """The samples: ids as they are, or as differences with log-probabilities in steps."""
    shape = (count, capture.tail)
    ids = expect_column(arrays, "tail_ids", shape, id_type)
    known = None
    if capture.keeps_tail_logprobs:
        known = expect_column(arrays, "tail_logprobs", shape, known_type)
    if known_type == np.uint16:
        ids = _cumulated(ids)
        known = None if known is None else from_steps(known, -1)
    return Tail.from_draws(ids, known)


def _draws(tail: Tail, capture: Capture) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """[M, R] every draw, by increasing id, and their log-probabilities."""
    order = np.argsort(tail.rows() << 32 | tail.ids, kind="stable")
    ordered = Tail(
        ids=tail.ids[order],
        counts=tail.counts[order],
        logprobs=None if tail.logprobs is None else tail.logprobs[order],
        offsets=tail.offsets,
    )
    entries = ordered.draws(capture.tail)
    known = None if ordered.logprobs is None else ordered.logprobs[entries]
    return ordered.ids[entries], known if capture.tail else None


def _differences(ids: NDArray[Any], id_type: Any) -> NDArray[Any]:
    """[M, K] the first id of each row, then the difference to the id before."""
    return np.diff(ids.astype(np.int64), axis=1, prepend=0).astype(id_type)


def _cumulated(differences: NDArray[Any]) -> NDArray[np.int32]:
    ids = np.empty(differences.shape, np.int32)
    for rows in row_blocks(*differences.shape):
        np.add.accumulate(differences[rows], axis=1, dtype=np.int32, out=ids[rows])
    return ids
