"""What is decided about a source before its first shard: format, alignment, head, codec."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..files import json_bytes, json_sha256
from ..schema import Block, Capture
from ..store.manifest import (
    MOST_SHARDS,
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    TokenizerIdentity,
    format_settings,
)
from ..store.provenance import Imported
from ..store.writer import BLOCK_TOKENS, fitted
from ..tokenizer_files import tokenizer_identity
from . import FORMATS
from .columns import BESIDE, TOKENS
from .files import TABLES, columns_of, source_files
from .measure import decided, fit_of, kind_of_values
from .reading import Reading, Tally
from .rows import NOTHING, Context
from .targets import block_of
from .vocabulary_fit import backend_of, expect_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .files import SourceFile
    from .rows import Format, SourceRows

_SAMPLE_ROWS, _SAMPLE_RECORDS = 8_192, 256
"""How much of a source decides: rows, or records if those come first."""
_FITTED = 2048
"""Rows of each part of the sample that decide about the alignment."""
_SAMPLE_DISTRIBUTIONS = 512
"""How many rows of whole distributions decide."""
_LONGEST = 1 << 30
"""Most tokens of a record unless the user names fewer."""
_READ_AGAIN = 16
"""Records whose text is tokenised again."""


def no_pickles(content: bytes, name: str) -> Any:
    """Refuse a file of torch, for callers without torch."""
    raise ColdstillError(f"{name}: is a file of torch, which this program does not read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    source: tuple[str, ...]
    store: str
    tokenizer: Any
    """A folder with tokenizer.json, or a tokenizer of transformers."""
    format: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    alignment: str | None = None
    """`own` or `next`, for sources that are too short to measure it."""
    teacher: str = ""
    head: int | None = None
    tail: int | None = None
    temperatures: tuple[float, ...] = ()
    split: str = "train"
    bad_rows: str = "refuse"
    accept_text: bool = False
    """Whether a tokenizer is accepted that does not give the ids of its text back."""
    sequence_length: int | None = None
    codec: str | dict[str, Any] = "plain"
    store_format: str | dict[str, Any] = "arrow"
    shard_tokens: int = 262_144
    tokens: tuple[str, ...] = ()
    """Files with the token ids of a source that has none."""
    load_pickled: Callable[[bytes, str], Any] = no_pickles
    logits_of: Callable[[Any, bool], Any] | None = None
    render: Callable[[Any], list[int]] | None = None

    @property
    def vocabulary(self) -> TokenizerIdentity:
        """The tokenizer's fingerprint and size."""
        return _identity(self.tokenizer)

    def identity(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        """What must be the same when an import is continued."""
        names = ("format", "alignment", "teacher", "tokens", "head", "tail", "split",
                 "sequence_length",
                 "codec", "store_format", "shard_tokens")  # fmt: skip
        own: dict[str, Any] = {
            "files": fingerprint(files),
            "config": json_sha256(dict(self.config)),
            "tokenizer": self.vocabulary.fingerprint,
            "temperatures": list(self.temperatures),
            **{name: getattr(self, name) for name in names},
        }
        value: dict[str, Any] = json.loads(json_bytes(own))  # as it is read back
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided."""

    kind: Format
    files: list[SourceFile]
    manifest: Manifest
    """Provisional: of more sequences and longer ones than there will be."""
    reading: Reading
    usual: float
    """The label's mean 1 / rank in the first rows."""
    opened: Iterator[SourceRows]
    """All records of the source, once: those that were measured are not read again."""
    sentences: tuple[str, ...] = ()
    """What was measured, for the user."""


@functools.lru_cache(maxsize=1)
def _identity(tokenizer: Any) -> TokenizerIdentity:
    return tokenizer_identity(tokenizer, None)


def fingerprint(files: Sequence[SourceFile]) -> str:
    """SHA-256 over names and sizes of the files."""
    return json_sha256([[file.name, file.size] for file in files])


def found(request: Request) -> tuple[str, list[SourceFile]]:
    """The name of the format, and the files. Raises ColdstillError if the source names nothing, or
    its format is not known."""
    suffixes = sorted({suffix for kind in FORMATS.values() for suffix in kind.suffixes})
    name = request.format
    if name is None:
        files = source_files(request.source, suffixes)
        name = _told(files[0])
    if name not in FORMATS:
        raise ColdstillError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    return name, source_files(request.source, FORMATS[name].suffixes)


def opened(request: Request) -> tuple[Format, list[SourceFile]]:
    """The format with its parameters, and the files. Raises ColdstillError as `found`, or if a
    parameter is missing."""
    name, files = found(request)
    kind = FORMATS[name]
    for option, given in (("--config", request.config), ("--tokens", request.tokens)):
        if given and option not in kind.options:
            raise ColdstillError(f"{option}: --format {name} does not read it; leave it out")
    context = Context(
        config=request.config,
        vocabulary=request.vocabulary.size,
        load_pickled=request.load_pickled,
        tokens=source_files(request.tokens, (*TABLES, ".idx")) if request.tokens else (),
        logits_of=request.logits_of,
        render=request.render,
    )
    return kind.configured(context), files


def _told(file: SourceFile) -> str:
    """The format that the columns or the ending of a file tell. Raises ColdstillError if they tell
    none."""
    columns = columns_of(file)
    for name, kind in FORMATS.items():
        if any(set(each) <= set(columns) for each in kind.told_by):
            return name
    if not columns:
        for name, kind in FORMATS.items():
            if not kind.told_by and file.address.lower().endswith(kind.suffixes):
                return name
    have = f"its columns are {', '.join(columns)}" if columns else "it has no columns"
    raise ColdstillError(
        f"{file.name}: of no known format: {have}; name it with --format ({', '.join(FORMATS)})"
    )


def make_plan(request: Request, kind: Format, files: list[SourceFile]) -> Plan:
    """Read the first records and decide. Raises ColdstillError if they break a rule, or fit neither
    the tokenizer nor any alignment."""
    identity = request.vocabulary
    where = files[0].name
    samples, records = _sample(kind, files)
    if not sum(map(len, samples)):
        raise ColdstillError(f"{where}: holds no records")
    reading = Reading(
        alignment=kind.documented or "next",
        values=kind_of_values(samples, kind, identity.size),
        rounding=kind.rounding,
        exact=kind.exact,
        capture=_capture(request, kind, samples, identity.size),
        vocabulary=identity.size,
        sequence_length=request.sequence_length or _LONGEST,
    )
    # faults of single rows and records come before figures over all of them
    trial = Tally(skip=request.bad_rows == "skip")
    blocks = [block_of(rows, reading, 0, trial) for rows in samples]
    if not any(len(block.targets) or rows.full is not None or (rows.ids != NOTHING).any()
               for block, rows in zip(blocks, samples, strict=True)):  # fmt: skip
        raise ColdstillError(f"{where}: no row of the first records has an entry")
    share = expect_tokenizer(
        backend_of(request.tokenizer),
        _texts(samples, identity.size),
        where,
        accept=request.accept_text,
    )
    fit = fit_of(samples, _FITTED)
    alignment = decided(fit, kind, request.alignment, where)
    if alignment != reading.alignment:
        reading = replace(reading, alignment=alignment)
        blocks = [block_of(rows, reading, 0, Tally(skip=True)) for rows in samples]
    longest = max(int(rows.tokens.lengths.max(initial=1)) for rows in samples)
    per_shard = max(1, request.shard_tokens // longest)
    settings = format_settings(request.codec, request.store_format, identity.size, reading.capture)
    lost, estimated = _lost(kind, reading), _estimated(kind, reading)
    manifest = Manifest(
        teacher=TeacherIdentity(
            name=request.teacher or "unknown", fingerprint="", family="", dtype="", parameters=0,
            bytes=0,
        ),
        tokenizer=identity,
        corpus=CorpusIdentity(
            fingerprint="", split="heldout" if request.split == "heldout" else "train", documents=0
        ),
        packing=Packing(
            sequence_length=_LONGEST, together=False, isolation="single", separator=(),
            fingerprint="",
        ),
        capture=replace(reading.capture, guessed_labels="label" in estimated),
        sequences=per_shard * MOST_SHARDS,
        shard_sequences=per_shard,
        block_sequences=min(per_shard, max(1, BLOCK_TOKENS // longest)),
        codec=settings["codec"],
        store=settings["store"],
        imported=Imported(
            format=kind.name,
            source=request.source,
            fingerprint=fingerprint(files),
            settings=kind.settings(),
            alignment="own" if alignment == "own" else "next",
            measured={**{k: round(v, 4) for k, v in fit.scores.items()}, "rows": float(fit.rows)},
            values=reading.values,  # type: ignore[arg-type]  # one of the four names
            lost=lost,
            estimated=estimated,
        ),
    )  # fmt: skip
    block = Block.concatenate(blocks)
    manifest = fitted(manifest, block.take(np.arange(min(len(block), manifest.block_sequences))))
    unread = _unread(columns_of(files[0]), kind)
    sentences = (
        *([f"columns that are not read: {', '.join(unread)}"] if unread else []),
        f"format {kind.name}, {len(files)} files; {fit.text()}",
        f"alignment: rows are about {'their own' if alignment == 'own' else 'the next'} token"
        + ("" if fit.is_clear else " (documented; too few rows to measure it)"),
        f"tokenizer: tokenising the text gives {share:.1%} of the pairs of ids back",
        *lost,
    )
    return Plan(
        kind=kind, files=files, manifest=manifest, reading=reading,
        usual=fit.scores[alignment], opened=records, sentences=sentences,
    )  # fmt: skip


def _sample(
    kind: Format, files: Sequence[SourceFile]
) -> tuple[list[SourceRows], Iterator[SourceRows]]:
    """The first records, and all of them."""
    records, samples, read = kind.records(files, 0), [], []
    rows = count = 0
    for part in records:
        read.append(part)
        enough = _SAMPLE_ROWS if part.full is None else _SAMPLE_DISTRIBUTIONS
        wanted = int(np.searchsorted(part.places.offsets, enough - rows))
        taken = part.part(0, min(max(1, wanted), len(part)))
        samples.append(taken)
        rows += len(taken.ids)
        count += len(taken)
        if rows >= enough or count >= _SAMPLE_RECORDS:
            break
    return samples, itertools.chain(read, records)


def _texts(samples: Sequence[SourceRows], vocabulary: int) -> list[Any]:
    """Tokens of some documents, without padding."""
    texts = []
    for rows in samples:
        for index in range(len(rows)):
            tokens = rows.tokens[index]
            if rows.real is not None:
                tokens = tokens[rows.real[index].astype(bool)]
            starts = [0] if rows.document_starts is None else rows.document_starts[index].tolist()
            for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
                document = tokens[start:stop]
                if len(document) and (0 <= document.min() <= document.max() < vocabulary):
                    texts.append(document[:2048])
            if len(texts) >= _READ_AGAIN:
                return texts
    return texts


def _capture(
    request: Request, kind: Format, samples: Sequence[SourceRows], vocabulary: int
) -> Capture:
    """What each position keeps. Raises ColdstillError if the source cannot give it."""
    if kind.values == "full":
        head, tail = min(request.head or 0, vocabulary), request.tail
        if head == vocabulary and tail:
            raise ColdstillError(
                f"--tail {tail}: a head of the whole vocabulary leaves nothing to be sampled; "
                "choose a smaller --head, or --tail 0"
            )
        return Capture(
            head=head,
            tail=(50 if head < vocabulary else 0) if tail is None else tail,
            temperatures=request.temperatures,
            tail_logprobs=request.split == "heldout",
        )
    for option, given in (("--tail", request.tail), ("--temperature", request.temperatures)):
        if given:
            raise ColdstillError(
                f"{option}: the source holds only the most probable tokens; a source of whole "
                "distributions is needed"
            )
    widest = max(int((rows.ids != NOTHING).sum(1).max(initial=0)) for rows in samples)
    head = request.head or max(1, widest)
    if head > vocabulary:
        raise ColdstillError(
            f"{samples[0].name}: a head of {head:,} tokens, but the tokenizer has {vocabulary:,}"
        )
    known = kind_of_values(samples, kind, vocabulary) == "logprobs"
    return Capture(head=head, tail=0, mass=known)


def _unread(columns: Sequence[str], kind: Format) -> list[str]:
    """The columns of a source that say nothing to its import."""
    used = {*BESIDE, *(name for names in kind.told_by for name in names), *kind.more_columns}
    tokens = next((name for name in TOKENS if name in columns), "")
    return [name for name in columns if name not in used and name != tokens]


def _lost(kind: Format, reading: Reading) -> tuple[str, ...]:
    lost = {
        "renormalised": ("no mass outside the head: the source renormalised over the kept tokens",),
        "logits": ("no mass outside the head: the source has logits without their normaliser",),
    }.get(reading.values, ())
    return (*lost, *kind.lost)


def _estimated(kind: Format, reading: Reading) -> tuple[str, ...]:
    if reading.values == "full":
        return ()
    return ("entropy",) if kind.names_label else ("label", "entropy")
