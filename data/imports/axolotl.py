"""axolotl's data sets for distillation: raw answers of a server, and rows that its plugin prepared.

Raw: the column `logprobs` has a list for each of the last tokens of a record. An entry is an object
`{"token": "token_id:123", "logprob": -0.5}`, or a number whose id is in `target_token_ids`. The
tokens are in `input_ids`, or are made of `messages` by the tokenizer's chat template.

Prepared: `target_logprobs` and `target_token_ids` have a row for each token; -inf fills a row that
there is not. The values are renormalised over the kept ids. `target_mask` is not read: versions of
the plugin set it one token too early or too late. `labels` say what is learned. The versions also
disagree about the alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ColdstillError
from ..ragged import Ragged
from .columns import Records, column_of, list_borders, read_records, rows_of, used_columns
from .files import TABLES, batches
from .matrices import expect_same_shape, id_matrix, padded
from .rows import NOTHING, Context, SourceRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_RAW, _IDS, _PREPARED, _MESSAGES = "logprobs", "target_token_ids", "target_logprobs", "messages"
_PREFIX = "token_id:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axolotl:
    """Raw and prepared rows of axolotl."""

    name: ClassVar[str] = "axolotl"
    suffixes: ClassVar[tuple[str, ...]] = TABLES
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ((_PREPARED, _IDS), (_RAW,))
    more_columns: ClassVar[tuple[str, ...]] = (_IDS, _MESSAGES)
    names_label: ClassVar[bool] = False
    documented: ClassVar[None] = None
    values: ClassVar[str] = "unknown"
    rounding: ClassVar[float] = 0.005
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 16
    options: ClassVar[tuple[str, ...]] = ("--config",)

    logprobs_field: str = _RAW
    temperature: float = 1.0
    """The temperature by which the plugin divided the prepared values."""
    render: Callable[[Any], list[int]] | None = None

    @classmethod
    def configured(cls, context: Context) -> Axolotl:
        """The name of the raw column and the temperature. Raises ColdstillError if one is wrong."""
        table = context.config
        temperature = table.get("kd_temperature", table.get("temperature", 1.0))
        if not isinstance(temperature, int | float) or not 0.0 < temperature <= 100.0:
            raise ColdstillError(f"--config: kd_temperature = {temperature!r:.40}: not above 0")
        return cls(
            logprobs_field=str(table.get("logprobs_field", _RAW)),
            temperature=float(temperature),
            render=context.render,
        )

    def settings(self) -> dict[str, Any]:
        return {"logprobs_field": self.logprobs_field, "temperature": self.temperature}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        where = files[0].name if files else ""

        def wanted(names: list[str]) -> list[str]:
            if _PREPARED in names:
                return used_columns(names, (_PREPARED, _IDS), where)
            more = [_IDS] if _IDS in names else []
            if "input_ids" not in names and _MESSAGES in names:
                return [_MESSAGES, self.logprobs_field, *more]
            return used_columns(names, (self.logprobs_field, *more), where)

        for file, first, batch in batches(files, start, self.rows, wanted):
            yield self._decoded(file.name, first, batch)

    def _decoded(self, name: str, first: int, batch: Any) -> SourceRows:
        names = list(batch[0]) if isinstance(batch, list) else batch.schema.names
        prepared = _PREPARED in names
        field = _PREPARED if prepared else self.logprobs_field
        needed = [field, _IDS] if _IDS in names else [field]
        if "input_ids" in names:
            records = read_records(batch, needed, name)
        else:
            records = self._rendered(column_of(batch, _MESSAGES, name), name)
        column = column_of(batch, field, name)
        if _IDS in needed:
            places, inner = rows_of(column, field, name, np.float32)
            other, ids = rows_of(column_of(batch, _IDS, name), _IDS, name, np.int64)
            expect_same_shape(name, first, (_IDS, other, ids), (field, places, inner))
        else:
            places, ids, inner = _entries(column, field, name)
        values = padded(inner, -np.inf)
        if prepared and self.temperature != 1.0:
            values = _normalised(values.astype(np.float64) * self.temperature)
        found = id_matrix(ids)
        missing = values == -np.inf
        if missing.any():
            found = np.where(missing, NOTHING, found)
        return SourceRows(
            name=name,
            first=first,
            tokens=records.tokens,
            places=_at_the_end(places, records),
            ids=found,
            values=values,
            learned=records.learned,
            real=records.real,
            document_starts=records.starts,
            faults=records.faults,
        )

    def _rendered(self, messages: Any, name: str) -> Records:
        if self.render is None:
            raise ColdstillError(
                f"{name}: has messages instead of input_ids, but the tokenizer has no chat template"
            )
        rows = [self.render(chat) for chat in messages.to_pylist()]
        tokens = Ragged.from_rows(rows, np.int64)
        return Records(tokens=tokens, starts=None, learned=None, real=None, faults={})


def _normalised(logits: NDArray[np.float64]) -> NDArray[np.float32]:
    """[S, K] log-probabilities over each row; rows of -inf alone stay so."""
    with np.errstate(all="ignore"):  # numbers that are not finite are found by the checks
        top = logits.max(axis=1, keepdims=True, initial=-np.inf)
        norm = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
        return np.where(np.isneginf(top), -np.inf, logits - norm).astype(np.float32)


def _at_the_end(places: Ragged, records: Records) -> Ragged:
    """[N][S] the tokens of the rows of each record, which belong to its last tokens; a record with
    more rows than tokens has a fault."""
    spare = records.tokens.lengths - places.lengths
    for row in np.flatnonzero(spare < 0).tolist():
        records.faults.setdefault(
            row, f"{places.lengths[row]} rows for {records.tokens.lengths[row]} tokens"
        )
    within = np.arange(len(places.values)) - np.repeat(places.offsets[:-1], places.lengths)
    return Ragged(within + np.repeat(spare, places.lengths), places.offsets)


def _entries(column: Any, field: str, name: str) -> tuple[Ragged, Ragged, Ragged]:
    """Rows, ids and values of a column of lists of lists of objects."""
    wrong = ColdstillError(
        f"{name}: column {field} has type {str(column.type)[:80]}, expected lists of lists of "
        '{"token": "token_id:1", "logprob": -0.5}'
    )
    outer = column
    if not pa.types.is_list(outer.type) or not pa.types.is_list(outer.type.value_type):
        raise wrong
    inner = outer.flatten()
    entries = inner.flatten()
    if not pa.types.is_struct(entries.type) or {"token", "logprob"} - {
        each.name for each in entries.type
    }:
        raise wrong
    token, value = pc.struct_field(entries, "token"), pc.struct_field(entries, "logprob")
    if not pa.types.is_string(token.type) and not pa.types.is_large_string(token.type):
        raise wrong
    if not pc.all(pc.starts_with(token, _PREFIX), skip_nulls=False).as_py() and len(token):
        shown = next((t for t in token.to_pylist() if not str(t).startswith(_PREFIX)), None)
        raise ColdstillError(
            f"{name}: column {field}: token {shown!r:.40} is not an id such as {_PREFIX}123; ask "
            "the server for ids (return_tokens_as_token_ids)"
        )
    try:
        ids = pc.cast(pc.utf8_slice_codeunits(token, len(_PREFIX)), pa.int64())
    except pa.ArrowException as error:
        raise ColdstillError(f"{name}: column {field}: an id is not a number") from error
    borders = list_borders(inner)
    values = value.to_numpy(zero_copy_only=False).astype(np.float32)
    return (
        Ragged(np.arange(len(inner)), list_borders(outer)),
        Ragged(np.asarray(ids.to_numpy(zero_copy_only=False), np.int64), borders),
        Ragged(values, borders),
    )
