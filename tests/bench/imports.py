"""How fast caches of other projects are read, aligned and checked, on one core.

The other side reads the same columns with pyarrow and does nothing with them. The rows are
synthetic: most of their labels are the most probable token.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from coldstill.data.imports import FORMATS
from coldstill.data.imports.files import source_files
from coldstill.data.imports.importing import Importer
from coldstill.data.imports.plan import Request, no_pickles
from coldstill.data.imports.reading import Reading, Tally
from coldstill.data.imports.rows import Context
from coldstill.data.imports.targets import block_of
from coldstill.data.schema import Capture
from measure import figure, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

V, RECORDS, LENGTH = 151_936, 64, 4096
REPEATS = 2


def rows(k: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens [N, T], ids [N * T, k] and log-probabilities, most probable first."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (RECORDS, LENGTH))
    count = tokens.size
    steps = random.integers(1, 40, (count, k))
    ids = (np.cumsum(steps, axis=1) + np.roll(tokens.ravel(), -1)[:, None] - steps[:, :1]) % V
    values = np.sort(random.normal(size=(count, k)) * 3, axis=1)[:, ::-1]
    values[:, 0] += 3
    values -= np.log(np.exp(values).sum(1, keepdims=True) * 1.05)
    return tokens, ids, values.astype(np.float32)


def nested(matrix: NDArray[Any]) -> Any:
    """[N * T, k] as a column of lists of lists."""
    inner = pa.ListArray.from_arrays(
        np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32), pa.array(matrix.ravel())
    )
    return pa.ListArray.from_arrays(np.arange(0, len(inner) + 1, LENGTH, dtype=np.int32), inner)


def raw(folder: Path) -> dict[str, Any]:
    tokens, ids, values = rows(50)
    columns = {"input_ids": pa.array(list(tokens)), "token_ids": nested(ids),
               "top_values": nested(values)}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=8)
    return {}


def prepared(folder: Path) -> dict[str, Any]:
    tokens, ids, values = rows(50)
    p = np.exp(values)
    values = np.log(p / p.sum(1, keepdims=True))
    columns = {"input_ids": pa.array(list(tokens)), "labels": pa.array(list(tokens)),
               "target_token_ids": nested(ids), "target_logprobs": nested(values)}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=8)
    return {}


def distillkit(folder: Path) -> dict[str, Any]:
    """The parameters of the largest published set: 140 + 288 bytes at a token."""
    tokens, ids, values = rows(128)
    exact = np.diff(values[:, :32], axis=1, prepend=np.float32(0))
    terms = np.zeros((len(ids), 3), np.float32)
    terms[:, 0] = -0.05
    coded = np.concatenate([exact, terms], 1).astype("<f4").view(np.uint8)
    bits = (ids[:, :, None] >> np.arange(17, -1, -1)) & 1
    packed = np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1)
    columns = {"input_ids": pa.array(list(tokens)), "compressed_logprobs": nested(coded),
               "bytepacked_indices": nested(packed)}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=8)
    return {"d": V, "k": 128, "exact_k": 32, "exact_dtype": "float32",
            "polynomial_terms": [0, 1, 2], "term_dtype": "float32", "residual_bins": [],
            "delta_encoding": True}  # fmt: skip


KINDS: dict[str, tuple[Callable[[Path], dict[str, Any]], str, int, str]] = {
    "raw rows, k = 50": (raw, "raw", 50, "logprobs"),
    "axolotl prepared, k = 50": (prepared, "axolotl", 50, "renormalised"),
    "DistillKit, k = 128": (distillkit, "distillkit", 128, "logprobs"),
}


@dataclass(frozen=True)
class Case:
    """One source in a folder."""

    folder: Path
    kind: str
    head: int
    values: str
    config: dict[str, Any]

    def read(self) -> int:
        """Decode, align and check every row; nothing is written."""
        files = source_files([str(self.folder / "rows.parquet")], (".parquet",))
        context = Context(config=self.config, vocabulary=V, load_pickled=no_pickles)
        made = FORMATS[self.kind].configured(context)
        capture = Capture(head=self.head, tail=0, mass=self.values == "logprobs")
        reading = Reading(
            alignment="next", values=self.values, rounding=made.rounding, exact=made.exact,
            capture=capture, vocabulary=V, sequence_length=LENGTH,
        )  # fmt: skip
        tally = Tally(skip=False)
        parts = made.records(files, 0)
        return sum(len(block_of(part, reading, 0, tally).targets) for part in parts)

    def columns(self) -> int:
        """Only read the columns."""
        with pq.ParquetFile(self.folder / "rows.parquet") as table:
            for batch in table.iter_batches(16):
                for column in batch.columns:
                    inner = column
                    while pa.types.is_list(inner.type):
                        inner = inner.flatten()
                    inner.to_numpy(zero_copy_only=False)
        return RECORDS * LENGTH

    def store(self, codec: str) -> int:
        """The whole import into a new store, which stays until the folder is deleted."""
        wanted = Request(
            source=(str(self.folder / "rows.parquet"),), store=tempfile.mkdtemp(dir=self.folder),
            format=self.kind, tokenizer=str(self.folder), config=self.config, accept_text=True,
            codec=codec,
        )  # fmt: skip
        return Importer(wanted, lambda *_: None, lambda _: None).run().positions


def speed(call: Callable[[], int]) -> float:
    """Positions per second of processor time, the best of a few runs on a shared machine."""
    best = 0.0
    for _ in range(REPEATS):
        begun = time.process_time()
        count = call()
        best = max(best, count / (time.process_time() - begun))
    return best


def main() -> None:
    """Measure every kind."""
    pa.set_cpu_count(1)
    figures = []
    for name, (make, kind, head, values) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            case = Case(Path(scratch), kind, head, values, make(Path(scratch)))
            write_tokenizer(case.folder / "tokenizer.json")
            floor = speed(case.columns)
            for what, call in (
                ("read and check", case.read),
                ("into a plain store", partial(case.store, "plain")),
                ("into a compact store", partial(case.store, "compact")),
            ):
                figures.append(figure(f"{name}: {what}", speed(call), floor, "positions/s"))
    write("imports", figures)


def write_tokenizer(path: Path) -> None:
    """A tokenizer of `V` words."""
    vocabulary = {f"w{i}": i for i in range(V)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    path.write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")


if __name__ == "__main__":
    main()
