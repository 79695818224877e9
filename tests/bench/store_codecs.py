"""Bytes, distortion and speed of every codec in every format, on one core.

Speeds are of the processor's time: others may use the machine. The codec `compact` is decoded by
numpy and by compiled loops in turns; without numba, both columns are numpy's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from coldstill.data.codecs import CODECS, distortion
from coldstill.data.codecs.compact import compiled
from coldstill.data.formats import STORES
from coldstill.data.schema import Block, Capture
from coldstill.data.store.writer import blocks_of
from coldstill.stages.models.device import describe_machine
from distributions import Measured, measured, readings
from measure import write_rows

if TYPE_CHECKING:
    from collections.abc import Callable

CAPTURES = tuple(
    Capture(head=k, tail=r)
    for k, r in ((50, 0), (12, 0), (0, 12), (0, 20), (0, 50), (6, 6), (16, 16))
)
BLOCK_TOKENS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One codec in one format, for one teacher and one capture."""

    vocabulary: int
    head: int
    tail: int
    codec: str
    store: str
    bytes_per_position: float
    """Bytes of the whole shard: targets, tokens, borders, hashes."""
    kl: float
    encode: float
    """Positions per second of the processor; `decode` is from columns in memory, `read` from the
    file."""
    decode_numpy: float
    decode: float
    read_numpy: float
    read: float
    variance: float | None
    """Variance of the sampled gradient, as a share of that of 50 multinomial draws."""
    machine: str


def main() -> None:
    """Measure every teacher."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rows: list[Row] = []
    for reading in readings():
        teacher = measured(reading, CAPTURES)
        print(f"V = {teacher.vocabulary:,}, mean entropy {teacher.entropy:.2f} nats")
        for capture in CAPTURES:
            rows.append(_half_and_word(teacher, capture))
            for codec in ("compact", "plain"):
                rows += [_row(teacher, capture, codec, store) for store in STORES]
            _print(rows)
    write_rows("store_codecs", rows)


def _row(teacher: Measured, capture: Capture, codec_name: str, store_name: str) -> Row:
    block = teacher.blocks[capture]
    length = int(block.sequences.tokens.lengths.max())
    parts = blocks_of(block, max(1, BLOCK_TOKENS // length))
    codec = CODECS[codec_name].fitting(vocabulary=teacher.vocabulary, capture=capture)
    codec = codec.learned(parts[0])
    store = STORES[store_name].fitting(compress=codec.compress)
    columns = [codec.encode(part) for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shard{store.suffix}"
        with store.create(path) as add:
            for one in columns:
                add(one)
        size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
        shard = store.open(path)

        def read() -> list[Block]:
            return [codec.decode(shard.read(i), capture) for i in range(shard.blocks)]

        kl = float(distortion(block.targets, Block.concatenate(read()).targets).mean())
        return _timed(
            teacher,
            capture,
            (codec_name, store_name),
            size,
            kl,
            encode=lambda: [codec.encode(part) for part in parts],
            **_both("decode", lambda: [codec.decode(one, capture) for one in columns]),
            **_both("read", read),
        )


def _both(name: str, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The call with numpy's decoder, and with the compiled one."""

    def by(worthwhile: int) -> Any:
        compiled.WORTHWHILE = worthwhile
        return call()

    return {f"{name}_numpy": lambda: by(1 << 60), name: lambda: by(0)}


def _half_and_word(teacher: Measured, capture: Capture) -> Row:
    """The usual record: float16 log-probabilities, 32-bit ids, and the tokens."""
    block = teacher.blocks[capture]
    targets = block.targets
    draws = targets.tail.ids[targets.tail.draws(capture.tail)]
    ids = np.concatenate([targets.head_ids, draws], axis=1)

    def encode() -> tuple[Any, Any]:
        return ids.astype(np.uint32), targets.head_logprobs.astype(np.float16)

    stored = encode()

    def decode() -> tuple[Any, Any]:
        return stored[0].astype(np.int32), stored[1].astype(np.float32)

    p, q = targets.head_logprobs.astype(float), decode()[1].astype(float)
    kl = float((np.exp(p) * (p - q)).sum(1).mean())
    size = sum(array.nbytes for array in stored) + block.sequences.tokens.values.nbytes
    return _timed(
        teacher,
        capture,
        ("fp16 + uint32", "-"),
        size,
        kl,
        encode=encode,
        **_both("decode", decode),
        **_both("read", decode),
    )


def _timed(
    teacher: Measured,
    capture: Capture,
    names: tuple[str, str],
    size: int,
    kl: float,
    **calls: Callable[[], Any],
) -> Row:
    count = len(teacher.blocks[capture].targets)
    return Row(
        vocabulary=teacher.vocabulary,
        head=capture.head,
        tail=capture.tail,
        codec=names[0],
        store=names[1],
        bytes_per_position=size / count,
        kl=abs(kl),
        **{name: count / seconds for name, seconds in _median_seconds(calls).items()},
        variance=teacher.variance.get(capture),
        machine=describe_machine(),
    )


def _median_seconds(calls: dict[str, Callable[[], Any]], repeats: int = 9) -> dict[str, float]:
    """Of the processor, for each of some calls that are made in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _print(rows: list[Row]) -> None:
    last = [row for row in rows if (row.vocabulary, row.head, row.tail) == _key(rows[-1])]
    noise = "" if last[0].variance is None else f", variance {last[0].variance:.2f} of 50 draws"
    print(f"  head {last[0].head}, tail {last[0].tail}{noise}")
    for row in last:
        print(
            f"    {row.codec:<14} {row.store:<6} {row.bytes_per_position:>7.1f} B/position  "
            f"KL {row.kl:.6f}  million/s: encode {row.encode / 1e6:>6.2f} "
            f"decode {row.decode_numpy / 1e6:>7.2f} {row.decode / 1e6:>7.2f} "
            f"read {row.read_numpy / 1e6:>7.2f} {row.read / 1e6:>7.2f}"
        )


def _key(row: Row) -> tuple[int, int, int]:
    return row.vocabulary, row.head, row.tail


if __name__ == "__main__":
    main()
