"""How much a recipe's stores hold: counted where it is known, estimated before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.places.local import LocalPlace
from ...data.places.opening import place_at
from ...data.prepared import SPLITS, CorpusLayout
from ...data.schema import Capture
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...data.store.reader import finished_shards, read_commit
from .expected import expected_sizes
from .pilot_record import read_pilot
from .split_size import SplitSize, answered

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.places.place import Place
    from ...data.prepared import Split
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe

_MOST_COMMITS = 256
"""Commit records looked at: of a store with more shards, evenly spaced ones stand for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """One store as it will be, and as it is."""

    split: Split
    sequences: int
    positions: int
    counted: bool
    """Whether positions are counted, not scaled from the whole corpus or from its text."""
    bytes_per_position: float
    measured: str | None
    """What it was measured on, `store` or `pilot`, or None where a rule foretells it."""
    bytes: int
    """Of the whole store."""
    bytes_missing: int
    """Of the shards that are not there yet."""
    sequences_missing: int
    shards: int
    shards_done: int
    address: str | None
    """Of a distant store."""
    folder: Path | None
    """Of one on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What is there of a store."""

    shards: int = 0
    sequences: int = 0
    positions: int = 0
    bytes: int = 0


def corpus_sizes(loaded: LoadedRecipe, run: Run) -> dict[Split, SplitSize]:
    """Both splits, before anything is sampled from them.

    Raises
        ColdstillError: sources that are not there
    """
    record = CorpusLayout(run.corpus).read_record()
    if record is not None:
        return {
            split: answered(record.splits[split], loaded.recipe)
            if record.prompts
            else SplitSize(
                sequences=record.splits[split].sequences,
                tokens=record.splits[split].tokens,
                positions=record.splits[split].positions,
                counted=True,
            )
            for split in SPLITS
        }
    return expected_sizes(loaded, run)


def store_sizes(
    loaded: LoadedRecipe, run: Run, sizes: dict[Split, SplitSize] | None = None
) -> dict[Split, StoreSize]:
    """Both stores; reads manifests and commit records, no data.

    sizes  of the corpus, where the caller has them at hand

    Raises
        ColdstillError: sources that are not there, a damaged record
    """
    sizes = sizes or corpus_sizes(loaded, run)
    return {split: _store_size(split, sizes[split], loaded.recipe, run) for split in SPLITS}


def captures(recipe: Recipe, vocabulary: int | None = None) -> dict[Split, Capture]:
    """What is kept at each position of either split.

    vocabulary  V if it is known: the held-out head is no larger
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
    """Bytes of one position: those of `plain` in Arrow, about for `compact`, which has to see the
    data."""
    if codec == "compact":
        # measured: 1.0 to 1.3 bytes an entry, 6 for the tokens and numbers beside it
        samples = (3 if capture.keeps_tail_logprobs else 1.1) * capture.tail
        return round(7 + 1.3 * capture.head + samples + 4 * len(capture.temperatures))
    sample = 8 if capture.keeps_tail_logprobs else 4
    # tokens, positions and borders beside the targets
    return 8 + 8 * capture.head + sample * capture.tail + 12 + 4 * len(capture.temperatures)


def pilot_row(pilot: Any, capture: Capture, codec: Any) -> dict[str, Any] | None:
    """What a pilot measured of a capture with a codec, if it did."""
    wanted = [capture.head, capture.tail, json.loads(json.dumps(codec))]
    rows = pilot["captures"] if pilot else []
    return next((r for r in rows if [r["head"], r["tail"], r["codec"]] == wanted), None)


def _store_size(split: Split, size: SplitSize, recipe: Recipe, run: Run) -> StoreSize:
    logits = recipe.logits
    sample = {"train": logits.sequences, "heldout": recipe.evaluation.sequences}[split]
    place = place_at({"train": run.logits, "heldout": run.heldout}[split])
    sequences = min(sample or size.sequences, size.sequences)
    positions = round(size.positions * sequences / max(1, size.sequences))
    shards = -(-sequences // max(1, logits.shard_tokens // recipe.corpus.sequence_length))
    done = _what_is_there(place)
    whole = done.sequences == sequences > 0
    if whole:
        positions, shards = done.positions, done.shards
    capture = captures(recipe)[split]
    codec = logits.codec if split == "train" else "plain"
    name = logits.codec_name if split == "train" else "plain"
    width: float = expected_bytes(capture, name)
    measured = None
    if done.positions:
        width, measured = done.bytes / done.positions, "store"
    elif split == "train" and (row := pilot_row(read_pilot(recipe, run), capture, codec)):
        width, measured = row["bytes_per_position"], "pilot"
    missing = round(max(0, positions - done.positions) * width)
    return StoreSize(
        split=split,
        sequences=sequences,
        positions=positions,
        counted=whole or (size.counted and sequences == size.sequences),
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


def _what_is_there(place: Place) -> _Done:
    if not place.exists(MANIFEST):
        return _Done()
    manifest = read_manifest(place)
    done = finished_shards(place, manifest)
    looked_at = done[:: -(-len(done) // _MOST_COMMITS) or 1]
    commits = [read_commit(place, manifest, index) for index in looked_at]
    share = len(done) / max(1, len(commits))
    return _Done(
        shards=len(done),
        sequences=sum(len(manifest.shard_rows(index)) for index in done),
        positions=round(share * sum(commit.positions for commit in commits)),
        bytes=round(share * sum(commit.bytes for commit in commits)),
    )
