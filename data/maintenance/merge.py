"""Merges several stores of one teacher."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from ..codecs import CodecError
from ..errors import ColdstillError
from ..files import json_sha256
from ..store.manifest import Manifest, difference, with_engine
from ..store.provenance import joined
from ..store.retokenized import Retokenized
from . import Notify, no_progress
from .rewrite import Settings, StoreRows, open_original, parts_of, reformatted, rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..store.reader import StoreReader


def merge(
    paths: Sequence[str],
    to: str,
    codec: Settings | str | None,
    store: Settings | str | None,
    *,
    notify: Notify = no_progress,
) -> Manifest:
    """Write several stores of one teacher as one, in the given order. Raises ColdstillError as
    `convert`; the stores have different teachers, tokenizers, packings or captures (the first field
    that differs), or share a sequence."""
    sources = [open_original(path, to) for path in paths]
    first = sources[0].manifest
    for source in sources[1:]:
        _expect_one_origin(source, sources[0])
        if differing := difference(first, _as_if(source.manifest, first)):
            raise ColdstillError(
                f"{source.place}: cannot be merged with {sources[0].place}: {differing}"
            )
    _expect_distinct(sources, notify)
    parts = tuple(part for source in sources for part in parts_of(source.manifest))
    engines = [first.teacher.engine]
    for source in sources:
        engines += [e for e in source.manifest.teacher.engines if e not in engines]
    manifest = replace(
        first,
        teacher=replace(first.teacher, other_engines=tuple(engines[1:])),
        corpus=replace(
            first.corpus,
            # Parts of one corpus count its documents once.
            documents=sum({part.corpus: part.documents for part in parts}.values()),
            fingerprint=_joined([part.corpus for part in parts]),
        ),
        packing=replace(first.packing, fingerprint=_joined([part.packing for part in parts])),
        sequences=sum(len(source) for source in sources),
        error=_worst([source.manifest.error for source in sources]),
        parts=parts if len(parts) > 1 else (),
        retokenized=_measured(sources),
        imported=joined([source.manifest.imported for source in sources]),
    )
    ends = np.cumsum([len(source) for source in sources])

    def pieces(rows: range) -> list[StoreRows]:
        found = []
        for source, end in zip(sources, ends.tolist(), strict=True):
            begin = end - len(source)
            inside = np.arange(max(rows.start, begin), min(rows.stop, end)) - begin
            if len(inside):
                found.append(StoreRows(source, inside))
        return found

    return rewrite(to, reformatted(manifest, codec, store), sources, pieces, notify)


def _expect_one_origin(source: StoreReader, first: StoreReader) -> None:
    """Refuse stores of teachers with different names where their weights are not known, and an
    imported store beside one that was captured."""
    one, other = first.manifest, source.manifest
    if not one.teacher.fingerprint and one.teacher.name != other.teacher.name:
        raise ColdstillError(
            f"{source.place}: of the teacher {other.teacher.name!r:.60}, and {first.place} of "
            f"{one.teacher.name!r:.60}; only stores of one teacher can be merged"
        )
    if (one.imported is None) != (other.imported is None):
        raise ColdstillError(
            f"{source.place} and {first.place}: one was imported and the other captured here; "
            "their records are not of one kind"
        )


def _as_if(other: Manifest, first: Manifest) -> Manifest:
    """The other manifest, with the fields that may differ between merged stores taken from
    `first`."""
    other = with_engine(other, first)
    return replace(
        other,
        corpus=replace(
            other.corpus,
            fingerprint=first.corpus.fingerprint,
            documents=first.corpus.documents,
        ),
        packing=replace(other.packing, fingerprint=first.packing.fingerprint),
        sequences=first.sequences,
        shard_sequences=first.shard_sequences,
        block_sequences=first.block_sequences,
        codec=first.codec,
        store=first.store,
        parts=first.parts,
        retokenized=_as_measured(other.retokenized, first.retokenized),
        imported=first.imported,
    )


def _as_measured(other: Retokenized | None, first: Retokenized | None) -> Retokenized | None:
    """What was decided for the other store, with what was measured in the first."""
    if other is None or first is None:
        return other
    decided = ("fingerprint", "size", "ambiguous", "unaligned", "branches")
    return replace(first, **{name: getattr(other, name) for name in decided})


def _measured(sources: Sequence[StoreReader]) -> Retokenized | None:
    """What was measured in all stores together."""
    parts = [own for source in sources if (own := source.manifest.retokenized) is not None]
    return functools.reduce(Retokenized.plus, parts) if parts else None


def _expect_distinct(sources: Sequence[StoreReader], notify: Notify) -> None:
    """Refuse a sequence that occurs twice: the same id in one corpus, or the same id and content.

    Takes 32 bytes of memory per sequence; everything else is streamed.
    """
    numbers: dict[str, int] = {}
    owners, corpora, ids, hashes = [], [], [], []
    total, done = sum(len(source) for source in sources), 0
    for number, source in enumerate(sources):
        for part in parts_of(source.manifest):
            corpus = numbers.setdefault(part.corpus, len(numbers))
            corpora.append(np.full(part.sequences, corpus))
        for block in source.batches(source.manifest.block_sequences):
            ids.append(block.sequences.ids)
            hashes.append(block.sequences.hashes)
            owners.append(np.full(len(block), number))
            done += len(block)
            notify("compare", done, total)
    id_N, owner_N = np.concatenate(ids), np.concatenate(owners)
    for other_N in (np.concatenate(corpora), np.concatenate(hashes)):
        order = np.lexsort((owner_N, other_N, id_N))
        again = (np.diff(id_N[order]) == 0) & (other_N[order][1:] == other_N[order][:-1])
        if again.any():
            one, other = order[again.argmax() : again.argmax() + 2].tolist()
            raise ColdstillError(
                f"{sources[owner_N[other]].place}: its sequence {id_N[other]} is in "
                f"{sources[owner_N[one]].place} too"
            )


def _joined(fingerprints: Sequence[str]) -> str:
    return fingerprints[0] if len(set(fingerprints)) == 1 else json_sha256(list(fingerprints))


def _worst(errors: Sequence[CodecError]) -> CodecError:
    worst = {f.name: max(getattr(e, f.name) for e in errors) for f in fields(CodecError)}
    return CodecError(**worst)
