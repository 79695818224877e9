"""llama.cpp's `--kl-divergence-base`: whole distributions of the second half of each chunk.

A file is `_logits_`, three int32 (tokens of a chunk, vocabulary, chunks) and the tokens of all
chunks; then for each chunk a row after each of its tokens from n_ctx / 2 on, but the last: float32
scale and minimum, and a uint16 for each token, the vocabulary padded to an even number. The
log-probability is `minimum + scale * number`. It is floored 16 nats below the largest one: number 0
means "at most this", and is read as no probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ColdstillError
from ..ragged import Ragged
from .parameters import whole_number
from .rows import Context, Distributions, SourceRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_MAGIC = b"_logits_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kld:
    """Logits of llama.cpp."""

    name: ClassVar[str] = "kld"
    suffixes: ClassVar[tuple[str, ...]] = (".kld",)
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ()
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = True
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "full"
    rounding: ClassVar[float] = 0.01
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = (
        "tokens more than 16 nats below the most probable one have no probability",
        "if the teacher's files say so, it has read the beginning-of-text token in place of the "
        "first token of each chunk",
    )
    rows: ClassVar[int] = 1
    options: ClassVar[tuple[str, ...]] = ("--config",)

    vocabulary: int
    bos: int | None = None
    """The token that the teacher has read in place of the first one of each chunk."""

    @classmethod
    def configured(cls, context: Context) -> Kld:
        """The vocabulary, and `bos` of the configuration, which must be an id. Raises
        ColdstillError."""
        bos = None
        if "bos" in context.config:
            bos = whole_number(context.config, "bos", 0, context.vocabulary - 1)
        return cls(vocabulary=context.vocabulary, bos=bos)

    def settings(self) -> dict[str, Any]:
        return {} if self.bos is None else {"bos": self.bos}

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        for file in files:
            with file.open() as stream:
                context, vocabulary, chunks = self._sizes(file, stream)
                if start >= chunks:
                    start -= chunks
                    continue
                tokens = np.frombuffer(stream.read(4 * context * chunks), "<i4")
                rows = context - 1 - context // 2
                width = 2 * ((vocabulary + 1) // 2) + 4
                stream.seek(2 * rows * width * start, 1)
                for chunk in range(start, chunks):
                    raw = np.frombuffer(stream.read(2 * rows * width), "<u2")
                    if len(raw) < rows * width:
                        raise _cut(file, f"{chunk} of {chunks} chunks are whole")
                    own = tokens[chunk * context : (chunk + 1) * context].astype(np.int64)
                    yield self._record(file.name, chunk, own, raw.reshape(rows, width), vocabulary)
            start = 0

    def _sizes(self, file: SourceFile, stream: Any) -> tuple[int, int, int]:
        """Tokens of a chunk, vocabulary and chunks, from the header of a file that is whole."""
        begin = stream.read(20)
        if begin[:8] != _MAGIC or len(begin) < 20:
            raise ColdstillError(
                f"{file.name}: does not begin with {_MAGIC.decode()}; expected a file of "
                "llama-perplexity --kl-divergence-base"
            )
        context, vocabulary, chunks = np.frombuffer(begin[8:], "<i4").tolist()
        if not (2 <= context <= 1 << 24 and 1 < vocabulary <= 1 << 25 and 0 < chunks <= 1 << 24):
            raise ColdstillError(
                f"{file.name}: {chunks} chunks of {context} tokens of {vocabulary}: the file is "
                "damaged, fetch it again"
            )
        rows, width = context - 1 - context // 2, 2 * ((vocabulary + 1) // 2) + 4
        size = 20 + chunks * (4 * context + 2 * rows * width)
        if file.size != size:
            raise _cut(file, f"{file.size:,} bytes, expected {size:,}")
        if vocabulary < self.vocabulary:
            raise ColdstillError(
                f"{file.name}: has {vocabulary:,} tokens, but the tokenizer has "
                f"{self.vocabulary:,}; name the teacher's tokenizer"
            )
        return context, vocabulary, chunks

    def _record(
        self, name: str, chunk: int, tokens: NDArray[np.int64], raw: NDArray[Any], vocabulary: int
    ) -> SourceRows:
        if self.bos is not None:
            tokens[0] = self.bos
        places = np.arange(len(raw)) + len(tokens) // 2
        kept = min(vocabulary, self.vocabulary)
        return SourceRows(
            name=name,
            first=chunk + 1,
            tokens=Ragged.from_rows([tokens], np.int64),
            places=Ragged.from_rows([places], np.int64),
            ids=np.zeros((len(raw), 0), np.int64),
            values=np.zeros((len(raw), 0), np.float32),
            full=Distributions(np.arange(len(raw)), partial(_logprobs, raw, kept)),
        )


def _logprobs(raw: NDArray[Any], vocabulary: int, rows: NDArray[np.int64]) -> NDArray[Any]:
    """[n, V] log-probabilities of some rows of a chunk."""
    chosen = raw[rows]
    scale, least = np.ascontiguousarray(chosen[:, :4]).view("<f4").T[:, :, None]
    numbers = chosen[:, 4 : 4 + vocabulary]
    with np.errstate(all="ignore"):
        return np.where(numbers == 0, np.float32(-np.inf), least + scale * numbers)


def _cut(file: SourceFile, what: str) -> ColdstillError:
    return ColdstillError(f"{file.name}: is cut short: {what}; fetch it again")
