"""DistillKit: ids as a stream of bits, log-probabilities as exact first values and a fitted curve.

`compressed_logprobs` has, for each row: `exact_k` values in `exact_dtype`; a coefficient in
`term_dtype` for each term; for each bin of residuals a scale and its levels. The other values are
`sum_j c_j term_j(t)` for t = 0 .. k - exact_k - 1 (with `normalize_t` evenly from 0 to 1), plus
`scale * level`. With `delta_encoding` all are differences, and the values their running sum.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ColdstillError
from .bits import SIZES, as_float32, big_endian, id_bits
from .columns import column_of, read_records, rows_of, used_columns
from .files import TABLES, batches
from .parameters import dtype_name, flag, parameters, whole_number
from .rows import Context, SourceRows, rows_for_each_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_IDS, _VALUES = "bytepacked_indices", "compressed_logprobs"
Term = int | str
_COLUMNS = (_IDS, _VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Consecutive fitted entries whose residual is stored."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def bytes(self) -> int:
        return SIZES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillKit:
    """The format of DistillKit's current code."""

    name: ClassVar[str] = "distillkit"
    suffixes: ClassVar[tuple[str, ...]] = TABLES
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ((_IDS, _VALUES),)
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = False
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "probabilities"
    rounding: ClassVar[float] = 0.05
    lost: ClassVar[tuple[str, ...]] = (
        "log-probabilities behind the exact first ones are those of a fitted curve",
    )
    rows: ClassVar[int] = 16
    options: ClassVar[tuple[str, ...]] = ("--config",)

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[Term, ...]
    term_dtype: str
    residual_bins: tuple[Bin, ...] = field(default_factory=tuple)
    delta_encoding: bool = False
    normalize_t: bool = False

    @classmethod
    def configured(cls, context: Context) -> DistillKit:
        """The codec's parameters. Raises ColdstillError if one is missing or impossible."""
        table = parameters(context, "distillkit", "logprob_compressor", ("d", "k", "exact_k"))
        terms = table.get("polynomial_terms") or []
        if not isinstance(terms, list) or any(
            not (each in ("sqrt", "exp") or (type(each) is int and 0 <= each <= 16))
            for each in terms
        ):
            raise ColdstillError(
                f"--config: polynomial_terms = {terms!r:.80}: expected powers, 'sqrt' or 'exp'"
            )
        bins = table.get("residual_bins") or []
        k = whole_number(table, "k", 1, 1 << 16)
        return cls(
            d=whole_number(table, "d", 2, 1 << 25),
            k=k,
            exact_k=whole_number(table, "exact_k", 0, k),
            exact_dtype=dtype_name(table, "exact_dtype", "bfloat16"),
            polynomial_terms=tuple(terms),
            term_dtype=dtype_name(table, "term_dtype", "float32"),
            residual_bins=tuple(
                Bin(
                    scale_dtype=dtype_name(each, "scale_dtype", "float16"),
                    element_bits=whole_number(each, "element_bits", 1, 16),
                    num_elements=whole_number(each, "num_elements", 1, 1 << 16),
                )
                for each in bins
            ),
            delta_encoding=flag(table, "delta_encoding"),
            normalize_t=flag(table, "normalize_t"),
        )

    def settings(self) -> dict[str, Any]:
        made = asdict(self)
        return {**made, "polynomial_terms": list(self.polynomial_terms),
                "residual_bins": [asdict(each) for each in self.residual_bins]}  # fmt: skip

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
        places, values = rows_of(column_of(batch, _VALUES, name), _VALUES, name, np.uint8)
        other, ids = rows_of(column_of(batch, _IDS, name), _IDS, name, np.uint8)
        widths = {_VALUES: self.bytes_of_values, _IDS: -(-self.k * id_bits(self.d) // 8)}
        for column, inner in ((_VALUES, values), (_IDS, ids)):
            wrong = np.flatnonzero(inner.lengths != widths[column])
            if len(wrong):
                raise ColdstillError(
                    f"{name}: record {first}: {column} has {inner.lengths[wrong[0]]} bytes at a "
                    f"token, but k = {self.k} and the other parameters of --config make "
                    f"{widths[column]}; give the configuration that the file was written with"
                )
        counts, faults = places.lengths, records.faults
        for row in np.flatnonzero(counts != other.lengths).tolist():
            raise ColdstillError(
                f"{name}: record {first + row}: {counts[row]} rows in {_VALUES}, but "
                f"{other.lengths[row]} in {_IDS}"
            )
        return SourceRows(
            name=name,
            first=first,
            tokens=records.tokens,
            places=rows_for_each_token(counts),
            ids=big_endian(ids.values.reshape(-1, widths[_IDS]), id_bits(self.d), self.k),
            values=self.decode(values.values.reshape(-1, widths[_VALUES])),
            learned=records.learned,
            real=records.real,
            document_starts=records.starts,
            faults=faults,
        )

    @property
    def bytes_of_values(self) -> int:
        """Bytes of `compressed_logprobs` at one token."""
        return (
            self.exact_k * SIZES[self.exact_dtype]
            + len(self.polynomial_terms) * SIZES[self.term_dtype]
            + sum(each.bytes for each in self.residual_bins)
        )

    def decode(self, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[S, k] log-probabilities from [S, bytes].  raw  the bytes of `compressed_logprobs`"""
        exact, begin = self.exact_k, self.exact_k * SIZES[self.exact_dtype]
        values = np.empty((len(raw), self.k), np.float32)
        with np.errstate(all="ignore"):  # numbers that are not finite are found by the checks
            values[:, :exact] = as_float32(raw[:, :begin], self.exact_dtype)
            end = begin + len(self.polynomial_terms) * SIZES[self.term_dtype]
            terms = as_float32(raw[:, begin:end], self.term_dtype)
            np.matmul(terms, self._basis(), out=values[:, exact:])
            place = exact
            for each in self.residual_bins:
                scale_end = end + SIZES[each.scale_dtype]
                scale = as_float32(raw[:, end:scale_end], each.scale_dtype)
                end += each.bytes
                levels = big_endian(raw[:, scale_end:end], each.element_bits, each.num_elements)
                if each.element_bits == 1:
                    levels = 2 * levels - 1
                else:
                    levels -= 1 << (each.element_bits - 1)
                width = min(each.num_elements, self.k - place)
                values[:, place : place + width] += levels[:, :width] * scale
                place += width
            if self.delta_encoding:
                np.cumsum(values, axis=1, out=values)
        return values

    def _basis(self) -> NDArray[np.float32]:
        """[terms, k - exact_k] each term at each fitted place."""
        count = self.k - self.exact_k
        t = np.linspace(0.0, 1.0, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        of = {"sqrt": np.sqrt, "exp": np.exp}
        rows = [of[e](t) if isinstance(e, str) else t**e for e in self.polynomial_terms]
        return np.array(rows, np.float64).reshape(len(rows), count).astype(np.float32)
