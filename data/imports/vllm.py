"""vLLM's `prompt_logprobs` as JSON lines: for each token the k most probable ones and itself.

A line has `prompt_token_ids` and `prompt_logprobs`: null for the first token, then an object
`{"123": {"logprob": -0.5, "rank": 1}, ...}` for each token. The entry of the token itself is always
there. If its rank is above k it is not part of the head, but its log-probability is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..ragged import Ragged
from .columns import NO_ID
from .files import LINES, batches
from .rows import NOTHING, Context, SourceRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .files import SourceFile

_TOKENS, _ROWS = "prompt_token_ids", "prompt_logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """`prompt_logprobs` of vLLM."""

    name: ClassVar[str] = "vllm"
    suffixes: ClassVar[tuple[str, ...]] = LINES
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ((_ROWS,),)
    more_columns: ClassVar[tuple[str, ...]] = (_TOKENS,)
    names_label: ClassVar[bool] = True
    documented: ClassVar[str] = "own"
    values: ClassVar[str] = "logprobs"
    rounding: ClassVar[float] = 0.002
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 64
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, context: Context) -> Vllm:
        return cls()

    def settings(self) -> dict[str, Any]:
        return {}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        for file, first, batch in batches(files, start, self.rows, lambda names: names):
            yield self._decoded(file.name, first, batch)

    def _decoded(self, name: str, first: int, batch: list[dict[str, Any]]) -> SourceRows:
        tokens: list[list[int]] = []
        places: list[list[int]] = []
        rows: list[tuple[list[int], list[float], list[int], float]] = []
        faults: dict[int, str] = {}
        for index, record in enumerate(batch):
            try:
                ids = _token_ids(record)
                found = [
                    (place, _row(row, ids[place]))
                    for place, row in enumerate(_rows(record, len(ids)))
                    if row is not None
                ]
            except ValueError as fault:
                faults[index] = str(fault)
                ids, found = [], []
            tokens.append(ids)
            places.append([place for place, _ in found])
            rows += [row for _, row in found]
        width = max((len(row[0]) for row in rows), default=0)
        ids_SK = np.full((len(rows), width), NOTHING, np.int64)
        values_SK = np.full((len(rows), width), -np.inf, np.float32)
        heads = _heads(places, rows)
        for index, (k, (ids, values, ranks, _)) in enumerate(zip(heads, rows, strict=True)):
            # an entry of -inf is a token that cannot come
            kept = [n for n, rank in enumerate(ranks) if rank <= k and values[n] != -np.inf]
            ids_SK[index, : len(kept)] = [ids[place] for place in kept]
            values_SK[index, : len(kept)] = [values[place] for place in kept]
        return SourceRows(
            name=name,
            first=first,
            tokens=Ragged.from_rows(tokens, np.int64),
            places=Ragged.from_rows(places, np.int64),
            ids=ids_SK,
            values=values_SK,
            own_logprob=np.array([row[3] for row in rows], np.float32),
            faults=faults,
        )


def _heads(places: list[list[int]], rows: list[Any]) -> Iterator[int]:
    """The k of each row. Where the token itself is not among the k most probable ones, a row has
    k + 1 entries; the records of a file may have been made with different k."""
    first = 0
    for own in places:
        part = rows[first : first + len(own)]
        yield from [min((len(row[0]) for row in part), default=0)] * len(part)
        first += len(own)


def _token_ids(record: dict[str, Any]) -> list[int]:
    ids = record.get(_TOKENS)
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"{_TOKENS} is not a list of token ids")
    if any(abs(each) >= 1 << 62 for each in ids):
        raise ValueError(f"{_TOKENS} holds a number beyond 62 bits")
    return ids


def _rows(record: dict[str, Any], count: int) -> list[dict[str, Any] | None]:
    rows = record.get(_ROWS)
    if not isinstance(rows, list) or not all(r is None or isinstance(r, dict) for r in rows):
        raise ValueError(f"{_ROWS} is not a list of objects")
    if len(rows) != count:
        raise ValueError(f"{len(rows)} rows in {_ROWS} for {count} tokens")
    return rows


def _row(row: dict[str, Any], own: int) -> tuple[list[int], list[float], list[int], float]:
    """Ids, log-probabilities and ranks of the entries, and the log-probability of the token."""
    ids, values, ranks = [], [], []
    for key, value in row.items():
        try:
            number = int(key)
            ids.append(number if number >= 0 else NO_ID)  # not an entry that is lacking
            values.append(float(value["logprob"]))
            ranks.append(int(value["rank"]))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the entry {key!r:.30} is not an id with a logprob and a rank"
            ) from error
    if own not in ids:
        raise ValueError(f"a row about token {own} lacks that token, which vLLM always adds")
    return ids, values, ranks, values[ids.index(own)]
