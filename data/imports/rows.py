"""What a format's reader hands over: records of a source with their rows of probabilities.

A record is one entry of the source: a text, a chat, or a packed sequence. A row is what the source
stores at one token of a record: some token ids, each with a number. Whether a row is about its own
token or about the next one, and whether its numbers are log-probabilities, is measured later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from ..ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

NOTHING = -1
"""The id of an entry that a row does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class Distributions:
    """Whole distributions, computed when they are needed: all at once would be gigabytes."""

    rows: NDArray[np.int64]
    """[S] the row of each distribution in what `read` reads."""
    read: Callable[[NDArray[np.int64]], NDArray[Any]]
    """[n, V] float32 log-probabilities of some rows; -inf for tokens that cannot come."""

    def take(self, chosen: NDArray[np.int64]) -> Distributions:
        return Distributions(self.rows[chosen], self.read)

    def parts(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """All distributions in order, a few at a time."""
        for start in range(0, len(self.rows), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(self.rows)))
            yield part, self.read(self.rows[part])


_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceRows:
    """N consecutive records with S rows of up to K entries."""

    name: str
    """The file, for messages."""
    first: int
    """Number of the first record in the file, counted from 1."""
    tokens: Ragged
    """[N][T] int64 token ids; empty for a record with a fault."""
    places: Ragged
    """[N][S] int64 index of the token beside which each row is stored, increasing."""
    ids: NDArray[Any]
    """[S, K] int64 token ids of all rows, in any order; `NOTHING` where a row has fewer entries."""
    values: NDArray[Any]
    """[S, K] float32 log-probabilities or logits of `ids`."""
    own_logprob: NDArray[Any] | None = None
    """[S] log-probability of the row's own token, if the source states it; NaN where it does
    not."""
    full: Distributions | None = None
    """[S, V] log-probabilities of the whole vocabulary; then K is 0."""
    learned: Ragged | None = None
    """[N][T] whether a token is learned; None if all are."""
    real: Ragged | None = None
    """[N][T] whether a token is not padding; None if none is."""
    document_starts: Ragged | None = None
    """[N][D] where documents begin; None if a record is one document."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """What is wrong with a record, by its index."""

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, index: int) -> str:
        """A record for messages."""
        return f"{self.name}: record {self.first + index}"

    def part(self, start: int, stop: int) -> SourceRows:
        """The records from `start` to before `stop`."""
        rows = np.arange(start, stop)
        own = slice(int(self.places.offsets[start]), int(self.places.offsets[stop]))

        def cut(column: Ragged | None) -> Ragged | None:
            return None if column is None else column.take(rows)

        return SourceRows(
            name=self.name,
            first=self.first + start,
            tokens=self.tokens.take(rows),
            places=self.places.take(rows),
            ids=self.ids[own],
            values=self.values[own],
            own_logprob=None if self.own_logprob is None else self.own_logprob[own],
            full=None if self.full is None else self.full.take(np.arange(own.start, own.stop)),
            learned=cut(self.learned),
            real=cut(self.real),
            document_starts=cut(self.document_starts),
            faults={i - start: what for i, what in self.faults.items() if start <= i < stop},
        )


class Format(Protocol):
    """One kind of cache. Each is one file and one line in `FORMATS`."""

    name: ClassVar[str]
    """Its name on the command line."""
    suffixes: ClassVar[tuple[str, ...]]
    """The endings of its files."""
    told_by: ClassVar[tuple[tuple[str, ...], ...]]
    """Sets of columns that tell the format; none for files that are no tables."""
    more_columns: ClassVar[tuple[str, ...]]
    """Further columns that are read where they are there."""
    names_label: ClassVar[bool]
    """Whether the label's log-probability is in every row."""
    documented: ClassVar[str | None]
    """`next` if rows are said to be about the next token, `own` if about their own; None if its
    writers disagree. The measured reading counts."""
    values: ClassVar[str]
    """`logprobs`, `logits` or `renormalised`, `full`; `unknown` if its writers disagree, and
    `probabilities` if they disagree but never store logits: then sums above 1 are faults."""
    rounding: ClassVar[float]
    """Largest excess of a row's sum of probabilities over 1 that its codec explains."""
    exact: int
    """Number of first entries of a row that its writer stored in falling order; 0 if none."""
    lost: ClassVar[tuple[str, ...]]
    """What files of this kind never hold, besides the mass, one sentence each."""
    rows: ClassVar[int]
    """Records that are read at a time."""
    options: ClassVar[tuple[str, ...]]
    """Options of the command that only some formats read: `--config`, `--tokens`."""

    @classmethod
    def configured(cls, context: Context) -> Format:
        """The format with its parameters. Raises ColdstillError if one is missing or impossible."""

    def settings(self) -> dict[str, Any]:
        """What the manifest records of it: the parameters of its codec."""

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        """The records of all files from number `start` on, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a format may need besides its own files."""

    config: Mapping[str, Any]
    """The parsed file of `--config`; empty if there is none."""
    vocabulary: int
    """V, the number of the tokenizer's tokens."""
    load_pickled: Callable[[bytes, str], Any]
    """Loads the bytes of a `torch.save` file without running code, with arrays for tensors; the
    second argument names the file."""
    tokens: Sequence[SourceFile] = ()
    """Files with the token ids of a source that has none."""
    logits_of: Callable[[NDArray[Any], bool], NDArray[Any]] | None = None
    """[n, V] float32 logits of hidden states [n, H] by the teacher's head; with true after its
    final norm. None if the teacher's weights are not known."""
    render: Callable[[Any], list[int]] | None = None
    """The token ids of a chat by the tokenizer's template; None if it has none."""


def rows_for_each_token(lengths_N: NDArray[np.int64]) -> Ragged:
    """[N][S] places of records that have a row beside each of their first S tokens."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N, dtype=np.int64)])
    values = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], lengths_N)
    return Ragged(values, offsets)
