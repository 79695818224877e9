"""Rows of ids and values as plain columns: `token_ids` and `top_values`.

With `normalized_logits`, which are probabilities, the normaliser of raw logits is known: the
difference of the value and the log of the probability is one number a row. Whether these
probabilities are of the whole vocabulary or of the kept ids is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .columns import column_of, read_records, rows_of, used_columns
from .files import TABLES, batches
from .matrices import expect_same_shape, id_matrix, padded
from .rows import Context, SourceRows, rows_for_each_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_IDS, _VALUES, _PROBABILITIES = "token_ids", "top_values", "normalized_logits"
_SAME = 0.05
"""Largest spread of a row's normaliser over its entries: half precision keeps three digits."""
_COLUMNS = (_IDS, _VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRows:
    """Plain columns of ids and values."""

    name: ClassVar[str] = "raw"
    suffixes: ClassVar[tuple[str, ...]] = TABLES
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ((_IDS, _VALUES),)
    more_columns: ClassVar[tuple[str, ...]] = (_PROBABILITIES,)
    names_label: ClassVar[bool] = False
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "unknown"
    rounding: ClassVar[float] = 0.005
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 16
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, context: Context) -> RawRows:
        return cls()

    def settings(self) -> dict[str, Any]:
        return {}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        where = files[0].name if files else ""

        def wanted(names: list[str]) -> list[str]:
            more = [_PROBABILITIES] if _PROBABILITIES in names else []
            return used_columns(names, [*_COLUMNS, *more], where)

        for file, first, batch in batches(files, start, self.rows, wanted):
            yield self._decoded(file.name, first, batch)

    def _decoded(self, name: str, first: int, batch: Any) -> SourceRows:
        names = batch[0] if isinstance(batch, list) else batch.schema.names
        needed = [c for c in (*_COLUMNS, _PROBABILITIES) if c in names]
        records = read_records(batch, needed, name)
        places, ids = rows_of(column_of(batch, _IDS, name), _IDS, name, np.int64)
        matrices = [id_matrix(ids)]
        for column in needed[1:]:
            other, inner = rows_of(column_of(batch, column, name), column, name, np.float32)
            expect_same_shape(name, first, (_IDS, places, ids), (column, other, inner))
            matrices.append(padded(inner, -np.inf))
        values = matrices[1]
        if len(matrices) == 3:
            values = _normalised(values, matrices[2])
        return SourceRows(
            name=name,
            first=first,
            tokens=records.tokens,
            places=rows_for_each_token(places.lengths),
            ids=matrices[0],
            values=values,
            learned=records.learned,
            real=records.real,
            document_starts=records.starts,
            faults=records.faults,
        )


def _normalised(values: NDArray[Any], probabilities: NDArray[Any]) -> NDArray[Any]:
    """Log-probabilities from logits and the probabilities beside them; NaN where these disagree.

    The normaliser is the median over a row, since small probabilities have few digits.
    """
    with np.errstate(all="ignore"):
        gaps = values.astype(np.float64) - np.log(probabilities.astype(np.float64))
        known = np.isfinite(gaps) & (probabilities > 1e-6)
        gaps = np.where(known, gaps, np.nan)
        some = known.any(1)
        norm = np.full(len(values), np.nan)
        if some.any():
            norm[some] = np.nanmedian(gaps[some], axis=1)
        spread = np.nanmax(np.abs(gaps - norm[:, None]), axis=1, initial=0.0, where=known)
        norm[spread > _SAME] = np.nan
        made: NDArray[Any] = (values - norm[:, None]).astype(np.float32)
    return made
