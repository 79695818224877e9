"""Makes a store smaller, without the teacher and without bias: fewer sequences, or fewer targets.

Tokens that leave the head join the tail: their mass is added to the tail's, and new samples are
drawn from the old samples and these tokens together. The old samples represent the old tail without
bias, so samples of them do, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..files import json_sha256
from ..order import uniform
from ..schema import Block, Tail
from . import Notify, no_progress
from .rewrite import open_original, reformatted, rewrite, rows_from

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Capture, Targets
    from ..store.manifest import Manifest, Part
    from ..store.reader import StoreReader


def take(path: str, to: str, rows: NDArray[np.int64], *, notify: Notify = no_progress) -> Manifest:
    """Write the chosen sequences of a store, in their order. Raises ColdstillError as
    `rewrite.convert`, or if no sequence was chosen."""
    source = open_original(path, to)
    if len(rows) == 0:
        raise ColdstillError(f"{path}: no sequence was chosen")
    old = source.manifest
    manifest = replace(
        reformatted(old, None, None),
        sequences=len(rows),
        packing=replace(
            old.packing, fingerprint=json_sha256([old.packing.fingerprint, rows.tolist()])
        ),
        parts=_parts_of_slice(old.parts, rows),
    )
    return rewrite(to, manifest, [source], rows_from(source, rows), notify)


def matching_rows(
    store: StoreReader,
    *,
    sequences: str | None = None,
    documents: str | None = None,
    fraction: float | None = None,
    seed: int = 0,
    notify: Notify = no_progress,
) -> NDArray[np.int64]:
    """[N] indices of the sequences that meet every condition, in store order.

    sequences  `A:B`, by index in the store, B not included
    documents  `A:B`, sequences that hold a part of one of these documents
    fraction   a seeded random share of those that meet the other conditions

    Raises
        ColdstillError: no condition, an invalid range, or a share outside (0, 1]
    """
    if sequences is None and documents is None and fraction is None:
        raise ColdstillError("slice: name what to keep: --sequences, --documents or --fraction")
    rows = np.arange(len(store))
    if sequences is not None:
        start, end = _range(sequences, "--sequences")
        rows = rows[start:end]
    if documents is not None:
        start, end = _range(documents, "--documents")
        rows = _with_documents(store, rows, start, end, notify)
    if fraction is not None:
        if not 0.0 < fraction <= 1.0:
            raise ColdstillError(f"--fraction: {fraction} is not above 0 and at most 1")
        random = np.random.Generator(np.random.PCG64([seed, 2]))
        count = min(len(rows), max(1, round(fraction * len(rows))))
        rows = np.sort(random.choice(rows, count, replace=False))
    return rows


def _with_documents(
    store: StoreReader, rows: NDArray[np.int64], start: int, end: int | None, notify: Notify
) -> NDArray[np.int64]:
    step = store.manifest.block_sequences
    kept = []
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        ids = store.read(part).sequences.document_ids
        inside = (ids.values >= start) & (ids.values < (np.inf if end is None else end))
        holders = np.unique(np.repeat(np.arange(len(part)), ids.lengths)[inside])
        kept.append(part[holders])
        notify("find documents", first + len(part), len(rows))
    return np.concatenate(kept) if kept else rows


def _range(text: str, option: str) -> tuple[int, int | None]:
    """Parse `A:B`, in which either number may be missing."""
    first, colon, last = text.partition(":")
    numbers = [number for number in (first, last) if number]
    if not colon or not all(n.isascii() and n.isdecimal() for n in numbers):
        raise ColdstillError(f"{option}: {text!r} is not a range such as 10:20")
    return int(first or 0), int(last) if last else None


_SEED = 0x5348_5249_4E4B
"""Added to the capture's seed, with the new sizes: draws must be independent of those of the
capture, and of those of an earlier shrink."""


def shrink(path: str, to: str, head: int, tail: int, *, notify: Notify = no_progress) -> Manifest:
    """Write a store with a smaller head or tail. Raises ColdstillError as `rewrite.convert` and
    `smaller_capture` do."""
    source = open_original(path, to)
    capture = smaller_capture(source.manifest, head, tail, path)
    manifest = reformatted(replace(source.manifest, capture=capture), None, None)

    def smaller(block: Block) -> Block:
        return shrink_block(block, capture)

    return rewrite(to, manifest, [source], rows_from(source), notify, smaller)


def smaller_capture(manifest: Manifest, head: int, tail: int, where: str) -> Capture:
    """The capture of the smaller store. Raises ColdstillError if the head or tail is larger than
    the store's, both are 0, or samples are asked for beside a head of the whole vocabulary."""
    old = manifest.capture
    whole = old.head == manifest.tokenizer.size
    if head > old.head or (tail > old.tail and not whole):
        raise ColdstillError(
            f"{where}: holds a head of {old.head} and a tail of {old.tail}; {head} and {tail} "
            "would need the teacher"
        )
    if head + tail == 0:
        raise ColdstillError(f"{where}: a head of 0 and a tail of 0 keep nothing")
    if head == manifest.tokenizer.size and tail:
        raise ColdstillError(f"{where}: nothing is left to sample outside a head of {head}")
    return replace(old, head=head, tail=tail)


def shrink_block(block: Block, capture: Capture) -> Block:
    """The smaller block; `capture` is the result of `smaller_capture`."""
    targets, sequences = block.targets, block.sequences
    kept, dropped = slice(capture.head), slice(capture.head, None)
    dropped_logprobs = targets.head_logprobs[:, dropped].astype(np.float64)
    masses = np.concatenate(
        [targets.log_tail[:, None].astype(np.float64), dropped_logprobs], axis=1
    )
    log_tail = np.logaddexp.reduce(masses, axis=1).astype(np.float32)
    ids_M = np.repeat(sequences.ids, sequences.positions.lengths)
    seed = capture.seed + _SEED + (capture.head << 40) + (capture.tail << 16)
    uniform_M = uniform(seed, ids_M, sequences.positions.values)
    tail = _resampled(block, capture, uniform_M)
    smaller = replace(
        targets,
        head_ids=np.ascontiguousarray(targets.head_ids[:, kept]),
        head_logprobs=np.ascontiguousarray(targets.head_logprobs[:, kept]),
        log_tail=np.minimum(log_tail, np.float32(0.0)),
        tail=tail if capture.keeps_tail_logprobs else replace(tail, logprobs=None),
    )
    return Block(sequences=sequences, targets=smaller, capture=capture)


def _resampled(block: Block, capture: Capture, uniform_M: NDArray[np.float64]) -> Tail:
    """New samples, with their log-probabilities if they are known."""
    targets, old = block.targets, block.capture
    if capture.tail == 0:
        return Tail.empty(len(targets))
    if (capture.head, capture.tail) == (old.head, old.tail):
        return targets.tail
    draws_MR, tail = targets.tail.draws(old.tail), targets.tail
    dropped = slice(capture.head, None)
    ids = np.concatenate([targets.head_ids[:, dropped], tail.ids[draws_MR]], axis=1)
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    weights = np.take_along_axis(_weights(targets, dropped, old.tail), order, axis=1)
    places = _systematic(weights, uniform_M, capture.tail)
    logprobs = None
    known: NDArray[Any] | None = targets.head_logprobs[:, :0]
    if old.tail:
        known = None if tail.logprobs is None else tail.logprobs[draws_MR]
    if known is not None:
        parts: list[NDArray[np.float32]] = [targets.head_logprobs[:, dropped], known]
        joined = np.take_along_axis(np.concatenate(parts, axis=1), order, axis=1)
        logprobs = np.take_along_axis(joined, places, axis=1)
    return Tail.from_draws(np.take_along_axis(ids, places, axis=1), logprobs)


def _weights(targets: Targets, dropped: slice, samples: int) -> NDArray[np.float64]:
    """[M, D + R] the weight of each dropped token and each old sample, up to a factor per row.

    The largest weight of a row is 1, so that a tail too small for float64 is shared out, too.
    """
    logs = np.concatenate(
        [
            targets.head_logprobs[:, dropped].astype(np.float64),
            np.repeat(targets.log_tail[:, None] - np.log(max(1, samples)), samples, axis=1),
        ],
        axis=1,
    )
    # a row without any mass must not become NaN
    largest = np.maximum(logs.max(1, keepdims=True), np.finfo(np.float64).min)
    weights: NDArray[np.float64] = np.exp(logs - largest)
    return weights


def _systematic(
    weights: NDArray[np.float64], uniform_M: NDArray[np.float64], count: int
) -> NDArray[np.int64]:
    """[M, R] indices drawn by equally spaced points with one random shift, as in the capture."""
    ends = weights.cumsum(1)
    points = (uniform_M[:, None] + np.arange(count)) / count * ends[:, -1:]
    places = np.zeros(points.shape, np.int64)
    for end_M in ends.T:  # all at once would be [M, R, D + R]
        places += end_M[:, None] <= points
    # Rounding may put the last point at the very end: take the last index with a weight then.
    last_M = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(1)
    found: NDArray[np.int64] = np.minimum(places, last_M[:, None])
    return found


def _parts_of_slice(parts: tuple[Part, ...], rows: NDArray[np.int64]) -> tuple[Part, ...]:
    made, start = [], 0
    for part in parts:
        inside = rows[(rows >= start) & (rows < start + part.sequences)] - start
        start += part.sequences
        if 0 < len(inside) < part.sequences:
            packing = json_sha256([part.packing, inside.tolist()])
            made.append(replace(part, packing=packing, sequences=len(inside)))
        elif len(inside):
            made.append(part)
    return tuple(made)
