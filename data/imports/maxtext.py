"""MaxText's top-k logits: ArrayRecord files of `tf.train.Example`.

An example has `inputs`, `targets`, `inputs_segmentation`, `targets_segmentation` and
`inputs_position`, and k `top_k_logits` and `top_k_indices` for each input. The row of input i is
about `targets[i]`. The inputs lack the last target of each document, so it is added behind the
document's inputs. The values are logits whose normaliser is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ColdstillError
from ..ragged import Ragged
from .array_record import array_records, fields, varints
from .columns import NO_ID
from .rows import Context, SourceRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_TOKENS, _TARGETS, _IDS, _VALUES = "inputs", "targets", "top_k_indices", "top_k_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxText:
    """Top-k logits of MaxText."""

    name: ClassVar[str] = "maxtext"
    suffixes: ClassVar[tuple[str, ...]] = (".array_record", ".arrayrecord")
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ()
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = False
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "logits"
    rounding: ClassVar[float] = 0.0
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 1
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, context: Context) -> MaxText:
        return cls()

    def settings(self) -> dict[str, Any]:
        return {}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        for file in files:
            with file.open() as stream:
                number = 0
                for number, content in enumerate(
                    array_records(stream, file.size, file.name), start=1
                ):
                    if number > start:
                        yield _record(file.name, number, content)
                start = max(0, start - number)


def _record(name: str, number: int, content: bytes) -> SourceRows:
    where = f"{name}: record {number}"
    if content[:1] == b"\x80":
        raise ColdstillError(
            f"{where}: is a pickle of an older script, which could run any code; write it again "
            "with a current MaxText"
        )
    try:
        example = _example(content)
    except (ValueError, IndexError) as error:
        raise ColdstillError(f"{where}: is not a tf.train.Example: {error}") from error
    if missing := [key for key in (_TOKENS, _TARGETS, _IDS, _VALUES) if key not in example]:
        raise ColdstillError(
            f"{where}: has no feature {missing[0]}; it has {', '.join(sorted(example))}"
        )
    inputs, targets = example[_TOKENS], example[_TARGETS]
    segment = example.get("inputs_segmentation", np.ones_like(inputs))
    goal = example.get("targets_segmentation", segment)
    lengths = {len(each) for each in (inputs, targets, segment, goal)}
    count = len(inputs)
    k, rest = divmod(len(example[_IDS]), max(1, count))
    faults: dict[int, str] = {}
    if len(lengths) > 1 or not count:
        faults[0] = "inputs, targets and segmentations have different lengths"
    elif rest or not k or len(example[_IDS]) != len(example[_VALUES]):
        faults[0] = (
            f"{len(example[_VALUES])} logits and {len(example[_IDS])} ids for {count} inputs"
        )
    tokens, starts = np.zeros(0, np.int64), [0]
    places: list[int] = []
    rows: list[int] = []
    if not faults:
        tokens, starts, places, rows = _documents(inputs, targets, segment, goal, faults)
    ids, values = example[_IDS], example[_VALUES]
    ids = np.where(ids < 0, NO_ID, ids)  # not an entry that is lacking
    chosen = np.array(rows, np.int64)
    return SourceRows(
        name=name,
        first=number,
        tokens=Ragged.from_rows([tokens], np.int64),
        places=Ragged.from_rows([places], np.int64),
        ids=ids.reshape(count, k)[chosen] if len(chosen) else np.zeros((0, max(k, 1)), np.int64),
        values=values.reshape(count, k)[chosen]
        if len(chosen)
        else np.zeros((0, max(k, 1)), np.float32),
        document_starts=Ragged.from_rows([starts], np.int64) if len(starts) > 1 else None,
        faults=faults,
    )


def _documents(
    inputs: NDArray[Any],
    targets: NDArray[Any],
    segment: NDArray[Any],
    goal: NDArray[Any],
    faults: dict[int, str],
) -> tuple[NDArray[Any], list[int], list[int], list[int]]:
    """Tokens of all documents, their borders, the places of the rows, and which rows they are."""
    tokens: list[int] = []
    starts: list[int] = []
    places: list[int] = []
    rows: list[int] = []
    borders = np.flatnonzero(np.diff(segment, prepend=segment[0] - 1))
    for begin, end in zip(borders.tolist(), [*borders[1:].tolist(), len(inputs)], strict=True):
        if segment[begin] <= 0:  # padding
            continue
        starts.append(len(tokens))
        own = (np.flatnonzero(goal[begin:end] > 0) + begin).tolist()
        inner = [row for row in own if row + 1 < end]
        wrong = [row for row in inner if targets[row] != inputs[row + 1]]
        if wrong:
            faults[0] = (
                f"target {wrong[0]} is {targets[wrong[0]]}, but the next input is "
                f"{inputs[wrong[0] + 1]}"
            )
        places += [len(tokens) + row - begin for row in own]
        rows += own
        tokens += inputs[begin:end].tolist()
        if own and own[-1] == end - 1:
            tokens.append(int(targets[end - 1]))
    return np.array(tokens, np.int64), starts or [0], places, rows


def _example(content: bytes) -> dict[str, NDArray[Any]]:
    """The lists of numbers of a `tf.train.Example`, by name."""
    found: dict[str, NDArray[Any]] = {}
    for number, kind, features in fields(content):
        if (number, kind) != (1, 2):
            raise ValueError("unknown fields")
        for _, _, entry in fields(features):
            parts = {inner: value for inner, _, value in fields(entry)}
            name = bytes(parts.get(1, b"")).decode("utf-8", "replace")
            for kind_of_list, _, packed in fields(parts.get(2, b"")):
                if kind_of_list in (2, 3):
                    found[name] = _numbers(packed, whole=kind_of_list == 3)
    return found


def _numbers(packed: bytes, *, whole: bool) -> NDArray[Any]:
    """A list of numbers, packed or one by one."""
    values = list(fields(packed))
    if whole:
        singles = [value for _, kind, value in values if kind == 0]
        if singles:
            return np.array(singles, np.uint64).view(np.int64)
        return varints(b"".join(value for _, _, value in values))
    return np.frombuffer(b"".join(value for _, _, value in values), "<f4")
