"""Sizes of a recipe's stores: counted if they exist, estimated before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.places.local import LocalPlace
from ...data.places.place import place_at
from ...data.prepared import SPLITS
from ...data.schema import Capture
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...data.store.reader import finished_shards, read_commit
from .corpus_size import corpus_sizes
from .pilot_record import read_pilot

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.places.place import Place
    from ...data.prepared import Split
    from ..recipe.tables import Recipe
    from ..recipe.work import Work
    from .corpus_size import SplitSize
    from .pilot_record import PilotRecord

_MOST_COMMITS = 256
"""Commit records that are read. In a store with more shards, evenly spaced ones represent all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """One store: its expected size, and how much of it exists."""

    sequences: int
    positions: int
    counted: bool
    """Whether the positions are counted, not scaled from the whole corpus or from its text."""
    bytes_per_position: float
    measured: str | None
    """Where the width was measured, `store` or `pilot`; None if it is estimated by a rule."""
    bytes: int
    """Bytes of the whole store."""
    bytes_missing: int
    """Bytes of the shards that do not exist yet."""
    sequences_missing: int
    shards: int
    shards_done: int
    address: str | None
    """Address of a remote store; None for a store on this machine."""
    folder: Path | None
    """Folder of a store on this machine; None for a remote store."""


def store_sizes(
    work: Work,
    corpus: dict[Split, SplitSize] | None = None,
    pilot: PilotRecord | None = None,
) -> dict[Split, StoreSize]:
    """Sizes of both stores; reads manifests and commit records, but no data.

    corpus  sizes of the corpus, if known already
    pilot   record of the pilot, if read already

    Raises
        ColdstillError: sources do not exist, or a record is damaged
    """
    corpus = corpus or corpus_sizes(work)
    pilot = pilot or read_pilot(work)
    return {split: _store_size(split, corpus[split], work, pilot) for split in SPLITS}


def captures(recipe: Recipe, vocabulary: int | None = None) -> dict[Split, Capture]:
    """What is captured at each position of either split.

    vocabulary  V if known; limits the held-out head
    """
    logits, evaluation = recipe.logits, recipe.evaluation
    head = evaluation.head if vocabulary is None else min(evaluation.head, vocabulary)
    return {
        "train": Capture(
            head=logits.head,
            tail=logits.tail,
            temperatures=logits.temperatures,
            seed=recipe.seed,
        ),
        "heldout": Capture(
            head=head,
            tail=0 if head == vocabulary else evaluation.tail,
            tail_logprobs=True,
            seed=recipe.seed,
        ),
    }


def expected_bytes(capture: Capture, codec: str) -> int:
    """Bytes per position: exact for `plain` in Arrow, estimated for `compact`, whose size depends
    on the data."""
    if codec == "compact":
        # measured: 1.0 to 1.3 bytes per entry, and 6 for the tokens and numbers beside it
        samples = (3 if capture.keeps_tail_logprobs else 1.1) * capture.tail
        return round(7 + 1.3 * capture.head + samples + 4 * len(capture.temperatures))
    sample = 8 if capture.keeps_tail_logprobs else 4
    # 8 for the token, its position and the document borders; 12 for three numbers per position
    return 8 + 8 * capture.head + sample * capture.tail + 12 + 4 * len(capture.temperatures)


def _store_size(split: Split, size: SplitSize, work: Work, pilot: PilotRecord | None) -> StoreSize:
    recipe, run = work.recipe, work.run
    logits = recipe.logits
    training = split == "train"
    place = place_at(run.logits if training else run.heldout)
    wanted = logits.sequences if training else recipe.evaluation.sequences
    sequences = min(wanted or size.sequences, size.sequences)
    positions = round(size.positions * sequences / max(1, size.sequences))
    shards = -(-sequences // max(1, logits.shard_tokens // recipe.corpus.sequence_length))
    done = _done(place)
    complete = done.sequences == sequences > 0
    if complete:
        positions, shards = done.positions, done.shards
    row = pilot.row(logits.head, logits.tail, logits.codec) if pilot and training else None
    width: float
    if done.positions:
        width, measured = done.bytes / done.positions, "store"
    elif row is not None:
        width, measured = row.bytes_per_position, "pilot"
    else:
        codec = logits.codec_name if training else "plain"
        width, measured = expected_bytes(captures(recipe)[split], codec), None
    missing = round(max(0, positions - done.positions) * width)
    return StoreSize(
        sequences=sequences,
        positions=positions,
        counted=complete or (size.counted and sequences == size.sequences),
        bytes_per_position=round(width, 1),
        measured=measured,
        bytes=done.bytes + missing,
        bytes_missing=missing,
        sequences_missing=max(0, sequences - done.sequences),
        shards=shards,
        shards_done=done.shards,
        address=None if isinstance(place, LocalPlace) else str(place),
        folder=place.root if isinstance(place, LocalPlace) else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """The finished shards of a store."""

    shards: int = 0
    sequences: int = 0
    positions: int = 0
    bytes: int = 0


def _done(place: Place) -> _Done:
    if not place.exists(MANIFEST):
        return _Done()
    manifest = read_manifest(place)
    done = finished_shards(place, manifest)
    chosen = done[:: -(-len(done) // _MOST_COMMITS) or 1]
    commits = [read_commit(place, manifest, index) for index in chosen]
    share = len(done) / max(1, len(commits))
    return _Done(
        shards=len(done),
        sequences=sum(len(manifest.shard_rows(index)) for index in done),
        positions=round(share * sum(commit.positions for commit in commits)),
        bytes=round(share * sum(commit.bytes for commit in commits)),
    )
