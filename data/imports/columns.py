"""Columns of Arrow, or of objects from JSON, as arrays; and what columns beside them tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ColdstillError, first_line
from ..ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

TOKENS = ("input_ids", "prompt_token_ids", "token_ids", "tokens")
"""Names of a column of token ids, the first that is there."""
BESIDE = ("attention_mask", "position_ids", "document_ids", "labels", "loss_mask",
          "assistant_masks", "completion_mask", "assistant_mask")  # fmt: skip
"""Columns that tell document borders and supervision."""
_MASKS = ("loss_mask", "assistant_masks", "completion_mask", "assistant_mask")
NO_ID = -2
"""The id of a token whose id is not a number. An entry that a row lacks has the id -1."""
_IGNORED = -100
"""The label of a token that is not learned, as in transformers."""


def column_of(batch: Any, name: str, where: str) -> Any:
    """A column of a record batch, or of a list of objects, as an array of Arrow. Raises
    ColdstillError if the values do not have one type."""
    if not isinstance(batch, list):
        return batch.column(name)
    try:
        return pa.array([record.get(name) for record in batch])
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise ColdstillError(f"{where}: column {name}: {first_line(error)}") from error


def lists(column: Any, name: str, where: str, dtype: Any) -> Ragged:
    """[N][*] a column of lists of numbers; a missing list is empty. Whole numbers that are missing
    or not whole are `NO_ID`, missing floats NaN. Raises ColdstillError for another type."""
    kind = column.type
    if not _is_list(kind) or not _is_number(kind.value_type):
        raise ColdstillError(f"{where}: column {name} has type {kind}, expected lists of numbers")
    return Ragged(_numbers(column.flatten(), dtype), list_borders(column))


def rows_of(column: Any, name: str, where: str, dtype: Any) -> tuple[Ragged, Ragged]:
    """[N][S] the index of each inner list, and [S][*] the inner lists, of a column of lists of
    lists. Raises ColdstillError for another type."""
    kind = column.type
    if not _is_list(kind) or not (_is_list(kind.value_type) or pa.types.is_null(kind.value_type)):
        raise ColdstillError(
            f"{where}: column {name} has type {kind}, expected a list of lists of numbers"
        )
    if pa.types.is_null(kind.value_type):
        offsets = list_borders(column)
        empty = Ragged(np.zeros(0, dtype), np.zeros(int(offsets[-1]) + 1, np.int64))
        return Ragged(np.arange(int(offsets[-1])), offsets), empty
    inner = lists(column.flatten(), name, where, dtype)
    return Ragged(np.arange(len(inner)), list_borders(column)), inner


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: Any) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )  # fmt: skip


def list_borders(column: Any) -> NDArray[np.int64]:
    """[N + 1] borders of the lists of a column; a missing list is empty."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _numbers(values: Any, dtype: Any) -> NDArray[Any]:
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if pa.types.is_null(values.type):
        fill = NO_ID if np.dtype(dtype).kind in "iu" else np.nan
        return np.full(len(values), fill).astype(dtype)
    if values.null_count:
        fill = NO_ID if pa.types.is_signed_integer(values.type) else 0
        if pa.types.is_floating(values.type):
            fill = np.nan
        elif pa.types.is_unsigned_integer(values.type):
            values, fill = values.cast(pa.int64(), safe=False), NO_ID
        values = pc.fill_null(values, pa.scalar(fill, values.type))
    array = values.to_numpy(zero_copy_only=False)
    if np.dtype(dtype).kind == "i" and array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.floor(array))
        array = np.where(whole, array, NO_ID)
    with np.errstate(over="ignore", invalid="ignore"):
        made: NDArray[Any] = array.astype(dtype, copy=False)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The tokens of N records with their document borders and supervision."""

    tokens: Ragged
    starts: Ragged | None
    learned: Ragged | None
    real: Ragged | None
    """[N][T] whether a token is not padding; None if none is."""
    faults: dict[int, str]


def used_columns(names: Sequence[str], needed: Sequence[str], where: str) -> list[str]:
    """The columns to read: tokens, those that a format needs, and those beside. Raises
    ColdstillError if one is missing (which)."""
    tokens = next((name for name in TOKENS if name in names and name not in needed), None)
    missing = [name for name in needed if name not in names]
    if tokens is None and not missing:
        missing = [TOKENS[0]]
    if missing:
        raise ColdstillError(
            f"{where}: has no column {missing[0]}; its columns are {', '.join(names)}"
        )
    beside = [name for name in BESIDE if name in names and name not in needed]
    return list(dict.fromkeys([str(tokens), *needed, *beside]))


def read_records(batch: Any, needed: Sequence[str], where: str) -> Records:
    """Tokens, borders and supervision of a batch. A record whose columns have different lengths, or
    whose labels are not its tokens, has a fault."""
    names = _names(batch)
    name = next(each for each in TOKENS if each in names and each not in needed)
    tokens = lists(column_of(batch, name, where), name, where, np.int64)
    faults: dict[int, str] = {}
    beside: dict[str, Ragged] = {}
    for each in (n for n in BESIDE if n in names and n not in needed):
        column = column_of(batch, each, where)
        if pa.types.is_null(column.type) or column.null_count == len(column):
            continue
        if not _is_list(column.type):
            continue  # a number of the whole record, such as `document_ids`
        beside[each] = lists(column, each, where, np.int64)
        for row in np.flatnonzero(beside[each].lengths != tokens.lengths).tolist():
            faults.setdefault(
                row, f"{each} has {beside[each].lengths[row]} entries for "
                f"{tokens.lengths[row]} tokens",
            )  # fmt: skip
    if faults:
        good = np.ones(len(tokens), np.bool_)
        good[list(faults)] = False
        keep = np.where(good, tokens.lengths, 0)
        tokens = _shortened(tokens, keep)
        beside = {n: _shortened(b, np.minimum(keep, b.lengths)) for n, b in beside.items()}
    return Records(
        tokens=tokens,
        starts=_starts(tokens, beside),
        learned=_learned(tokens, beside, faults),
        real=_real(tokens, beside),
        faults=faults,
    )


def _names(batch: Any) -> list[str]:
    if isinstance(batch, list):
        return list(dict.fromkeys(name for record in batch for name in record))
    return list(batch.schema.names)


def _shortened(column: Ragged, lengths_N: NDArray[np.int64]) -> Ragged:
    parts = [column[i][: int(n)] for i, n in enumerate(lengths_N)]
    return Ragged.from_rows(parts, column.values.dtype)


def _starts(tokens: Ragged, beside: Mapping[str, Ragged]) -> Ragged | None:
    """Borders where the number of the document changes, or positions begin again."""
    border = np.zeros(len(tokens.values), np.bool_)
    numbered = False
    for name in ("document_ids", "attention_mask"):
        # in an attention mask, numbers above 1 count the documents
        if name in beside and (name != "attention_mask" or beside[name].values.max(initial=0) > 1):
            border |= np.diff(beside[name].values, prepend=-2) != 0
            numbered = True
    if "position_ids" in beside:
        border |= np.diff(beside["position_ids"].values, prepend=-2) != 1
        numbered = True
    if not numbered:
        return None
    first = tokens.offsets[:-1][tokens.lengths > 0]
    border[first] = True
    flat = np.flatnonzero(border)
    row = np.searchsorted(tokens.offsets, flat, side="right") - 1
    counts = np.bincount(row, minlength=len(tokens))
    return Ragged(
        flat - tokens.offsets[row], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    )


def _learned(tokens: Ragged, beside: Mapping[str, Ragged], faults: dict[int, str]) -> Ragged | None:
    """Which tokens are learned, by labels and masks."""
    learned = np.ones(len(tokens.values), np.bool_)
    known = False
    if "labels" in beside:
        labels = beside["labels"].values
        own = labels != _IGNORED
        wrong = own & (labels != tokens.values)
        for flat in np.flatnonzero(wrong)[:1].tolist():
            row = int(np.searchsorted(tokens.offsets, flat, side="right")) - 1
            faults[row] = (
                f"labels has {labels[flat]} at token {flat - tokens.offsets[row]}, which is "
                f"{tokens.values[flat]}; labels should repeat the tokens, or be {_IGNORED}"
            )
        learned &= own
        known = True
    for name in _MASKS:
        if name in beside:
            learned &= beside[name].values == 1
            known = True
    return Ragged(learned, tokens.offsets) if known else None


def _real(tokens: Ragged, beside: Mapping[str, Ragged]) -> Ragged | None:
    if "attention_mask" not in beside or (beside["attention_mask"].values != 0).all():
        return None
    return Ragged(beside["attention_mask"].values != 0, tokens.offsets)
