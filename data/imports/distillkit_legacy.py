"""DistillKit's older files: ids in 64-bit words, exact first values, a polynomial for the others.

The value of entry a = 1 .. k - exact_k behind the exact ones is `sum_i c_i a^i`, with
`invert_polynomial` `sum_i c_i a^-i`, i = 0 .. degree; with `with_sqrt_term` the last coefficient is
that of `sqrt(a)`. Some writers stored log-probabilities, others logits minus their mean; nothing in
a file tells which.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ColdstillError
from .bits import id_bits, in_words
from .columns import column_of, read_records, rows_of, used_columns
from .files import TABLES, batches
from .parameters import flag, parameters, whole_number
from .rows import Context, SourceRows, rows_for_each_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_IDS, _EXACT, _TERMS = "packed_indices", "exact_values", "coeffs"
_COLUMNS = (_IDS, _EXACT, _TERMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillKitLegacy:
    """The format of DistillKit's older code."""

    name: ClassVar[str] = "distillkit-legacy"
    suffixes: ClassVar[tuple[str, ...]] = TABLES
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ((_IDS, _EXACT, _TERMS),)
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = False
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "unknown"
    rounding: ClassVar[float] = 0.05
    lost: ClassVar[tuple[str, ...]] = (
        "exact values are rounded to float16; those behind them are of a fitted polynomial",
    )
    rows: ClassVar[int] = 16
    options: ClassVar[tuple[str, ...]] = ("--config",)

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    with_sqrt_term: bool = False
    invert_polynomial: bool = True

    @classmethod
    def configured(cls, context: Context) -> DistillKitLegacy:
        """The codec's parameters. Raises ColdstillError if one is missing or impossible."""
        needed = ("vocab_size", "k", "exact_k", "polynomial_degree")
        table = parameters(context, cls.name, "logprob_compressor", needed)
        k = whole_number(table, "k", 1, 1 << 16)
        return cls(
            vocab_size=whole_number(table, "vocab_size", 2, 1 << 31),
            k=k,
            exact_k=whole_number(table, "exact_k", 0, k),
            polynomial_degree=whole_number(table, "polynomial_degree", 0, 64),
            with_sqrt_term=flag(table, "with_sqrt_term"),
            invert_polynomial=flag(table, "invert_polynomial"),
        )

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def exact(self) -> int:
        """Number of first entries that must not increase."""
        return self.exact_k

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        where = files[0].name if files else ""
        for file, first, batch in batches(
            files, start, self.rows, lambda names: used_columns(names, _COLUMNS, where)
        ):
            yield self._decoded(file.name, first, batch)

    def _decoded(self, name: str, first: int, batch: Any) -> SourceRows:
        records = read_records(batch, _COLUMNS, name)
        bits, fitted = id_bits(self.vocab_size), self.k - self.exact_k
        # without fitted entries the writer stores no coefficients
        terms = self.polynomial_degree + 1 + self.with_sqrt_term if fitted else 0
        widths = {_IDS: -(-self.k // (64 // bits)), _EXACT: self.exact_k, _TERMS: terms}
        types = {_IDS: np.int64, _EXACT: np.float32, _TERMS: np.float32}
        parts: dict[str, NDArray[Any]] = {}
        counts = None
        for column, dtype in types.items():
            places, inner = rows_of(column_of(batch, column, name), column, name, dtype)
            counts = places.lengths if counts is None else counts
            for row in np.flatnonzero(counts != places.lengths).tolist():
                raise ColdstillError(
                    f"{name}: record {first + row}: {places.lengths[row]} rows in {column}, but "
                    f"{counts[row]} in {_IDS}"
                )
            wrong = np.flatnonzero(inner.lengths != widths[column])
            if len(wrong):
                raise ColdstillError(
                    f"{name}: record {first}: {column} has {inner.lengths[wrong[0]]} numbers at a "
                    f"token, but the parameters of --config make {widths[column]}; give the "
                    "configuration that the file was written with"
                )
            parts[column] = inner.values.reshape(-1, widths[column])
        assert counts is not None
        words = parts[_IDS].view(np.uint64)
        values = np.empty((len(words), self.k), np.float32)
        values[:, : self.exact_k] = parts[_EXACT]
        with np.errstate(all="ignore"):  # numbers that are not finite are found by the checks
            if fitted:
                # in float64: large terms of opposite signs cancel
                values[:, self.exact_k :] = parts[_TERMS].astype(np.float64) @ self._basis()
        return SourceRows(
            name=name,
            first=first,
            tokens=records.tokens,
            places=rows_for_each_token(counts),
            ids=in_words(words, bits, self.k),
            values=values,
            learned=records.learned,
            real=records.real,
            document_starts=records.starts,
            faults=records.faults,
        )

    def _basis(self) -> NDArray[np.float64]:
        """[terms, k - exact_k] each term at each fitted place."""
        a = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        sign = -1.0 if self.invert_polynomial else 1.0
        rows = [a ** (sign * i) for i in range(self.polynomial_degree + 1)]
        if self.with_sqrt_term:
            rows.append(np.sqrt(a))
        return np.array(rows)
