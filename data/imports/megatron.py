"""Megatron-LM's cached logits: tar files beside the data set that they were made from.

`cp{C}_dp{D}__{last iteration}.tar` has a member `{iteration}.pt.zst` per iteration: the zstd of
`torch.save({values, indices_low, bit_17})`, each a list of one tensor [S, B, K] per micro-batch.
An entry of -1000 is empty. There are no token ids: the user gives those of the sequences, in the
order in which the trainer read them (iteration, micro-batch, data-parallel rank, row).
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from ..errors import ColdstillError, first_line
from ..ragged import Ragged
from .columns import read_records, used_columns
from .files import batches, file_errors
from .indexed_dataset import ENDINGS, token_sequences
from .rows import NOTHING, Context, SourceRows, rows_for_each_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_FILE = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar$")
_MEMBER = re.compile(r"(\d+)\.pt\.zst$")
_NONE = -999.0
"""A value of at most this means an empty entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Megatron:
    """Cached logits of Megatron-LM."""

    name: ClassVar[str] = "megatron"
    suffixes: ClassVar[tuple[str, ...]] = (".tar",)
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ()
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = False
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "unknown"
    rounding: ClassVar[float] = 0.005
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = ("log-probabilities are rounded to float16",)
    rows: ClassVar[int] = 1
    options: ClassVar[tuple[str, ...]] = ("--tokens",)

    tokens: Sequence[SourceFile]
    load: Callable[[bytes, str], Any]

    @classmethod
    def configured(cls, context: Context) -> Megatron:
        """Raises ColdstillError if the token ids are missing."""
        if not context.tokens:
            raise ColdstillError(
                "--format megatron: the files have no token ids; name a file of the sequences that "
                "the trainer read, in its order, with --tokens (a column input_ids, or the .idx of "
                "a data set that was not shuffled)"
            )
        return cls(tokens=context.tokens, load=context.load_pickled)

    def settings(self) -> dict[str, Any]:
        return {"tokens": [file.name for file in self.tokens]}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        tokens: Iterator[NDArray[Any]] = iter(())
        number, is_whole = 0, not self.tokens[0].address.endswith(ENDINGS)
        for name, payload in self._micro_batches(files):
            ids, values = _entries(payload, name)
            for row in range(ids.shape[1]):
                number += 1
                if number <= start:
                    continue
                if number == start + 1:
                    tokens = self._token_rows(start, len(ids))
                own = next(tokens, None)
                if own is None:
                    raise ColdstillError(
                        f"{name}: sequence {number} has no tokens: --tokens has only {number - 1} "
                        "sequences"
                    )
                yield self._record(name, number, own, ids[:, row], values[:, row])
        if is_whole and number > start and next(tokens, None) is not None:
            raise ColdstillError(
                f"--tokens has more than the {number} sequences of the source; give those that the "
                "trainer read"
            )

    def _record(
        self, name: str, number: int, tokens: NDArray[Any], ids: NDArray[Any], values: NDArray[Any]
    ) -> SourceRows:
        faults = {}
        if not len(ids) <= len(tokens) <= len(ids) + 1:
            faults[0] = f"{len(ids)} rows for {len(tokens)} tokens of --tokens"
        return SourceRows(
            name=name,
            first=number,
            tokens=Ragged.from_rows([tokens], np.int64),
            places=rows_for_each_token(np.array([len(ids)])),
            ids=ids,
            values=values,
            faults=faults,
        )

    def _token_rows(self, start: int, rows: int) -> Iterator[NDArray[Any]]:
        """The tokens of the sequences from number `start` on, of so many rows."""
        if self.tokens[0].address.endswith(ENDINGS):
            if len(self.tokens) > 1:
                raise ColdstillError("--tokens: more than one data set; name one")
            yield from token_sequences(self.tokens[0], rows, start)
            return
        where = self.tokens[0].name

        def wanted(names: list[str]) -> list[str]:
            return used_columns(names, (), where)[:1]

        for file, _, batch in batches(self.tokens, start, 16, wanted):
            yield from read_records(batch, (), file.name).tokens

    def _micro_batches(self, files: Sequence[SourceFile]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The micro-batches in the order of the trainer, with the file's name."""
        found: dict[int, dict[int, tuple[SourceFile, str]]] = defaultdict(dict)
        for file in files:
            match = _FILE.search(file.address)
            if match is None:
                raise ColdstillError(f"{file.name}: expected a name such as cp0_dp0__100.tar")
            if int(match[1]):
                raise ColdstillError(
                    f"{file.name}: is of a context-parallel run, which cuts sequences into parts; "
                    "such files are not read"
                )
            with _tar(file) as tar:
                for member in tar.getnames():
                    if number := _MEMBER.search(member):
                        found[int(number[1])][int(match[2])] = file, member
        for iteration in sorted(found):
            payloads = [
                (file.name, self._payload(file, member))
                for _, (file, member) in sorted(found[iteration].items())
            ]
            for part in range(max(len(payload["values"]) for _, payload in payloads)):
                for name, payload in payloads:
                    yield name, {key: payload[key][part] for key in _KEYS}

    def _payload(self, file: SourceFile, member: str) -> dict[str, Any]:
        name = f"{file.name}: {member}"
        with _tar(file) as tar:
            stream = tar.extractfile(member)
            packed = b"" if stream is None else stream.read()
        try:
            content = pa.input_stream(pa.BufferReader(packed), compression="zstd").read()
        except (OSError, pa.ArrowException) as error:
            raise ColdstillError(f"{name}: cannot be unpacked: {first_line(error)}") from error
        payload = self.load(content, name)
        if not isinstance(payload, dict) or {*_KEYS} - {*payload}:
            raise ColdstillError(f"{name}: expected a table of {', '.join(_KEYS)}")
        return payload


_KEYS = ("values", "indices_low", "bit_17")


@contextlib.contextmanager
def _tar(file: SourceFile) -> Iterator[Any]:
    """An open tar file; errors of reading it are one line."""
    with file_errors(file.name), file.open() as stream:
        try:
            with tarfile.open(fileobj=stream) as tar:
                yield tar
        except (tarfile.TarError, KeyError) as error:
            raise ColdstillError(
                f"{file.name}: is not a tar file, or it is cut short: {first_line(error)}; fetch "
                "it again"
            ) from error


def _entries(payload: dict[str, Any], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """[S, B, K] ids and log-probabilities of a micro-batch."""
    values, low, high = (np.asarray(payload[key]) for key in _KEYS)
    if values.ndim != 3 or values.shape != low.shape or values.shape != high.shape:
        raise ColdstillError(
            f"{name}: values {values.shape}, indices_low {low.shape}, bit_17 {high.shape}: "
            "expected three equal shapes [S, B, K]"
        )
    values = values.astype(np.float32)
    ids = low.astype(np.int64) + (high.astype(np.int64) << 16)
    return np.where(values <= _NONE, NOTHING, ids), values
