"""Sizes of a recipe's corpus and stores, and whether the stores fit on their disks.

Sizes are counted where the corpus or the store exists, and estimated before.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.files import SCRATCH_PREFIX
from ...data.places.local import LocalPlace
from ...data.places.place import place_at
from ...data.prepared import SPLITS, CorpusLayout
from ...data.schema import Capture
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...data.store.reader import finished_shards, read_commit
from ...data.store.writer import shard_sequences
from ..units import size
from .models import folder_of
from .pilot_record import read_pilot

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ...data.places.place import Place
    from ...data.prepared import Split, SplitRecord
    from ...stages.corpus.estimate import Estimate
    from ..recipe.tables import Recipe
    from ..recipe.work import Work
    from .pilot_record import PilotRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSize:
    sequences: int
    tokens: int
    positions: int
    """Supervised positions."""
    counted: bool
    """Whether the numbers are counted and not estimated."""
    basis: str = ""
    """What the estimate is based on, for the user; empty if counted."""


def corpus_sizes(work: Work) -> dict[Split, SplitSize]:
    """Sizes of both splits, before a sample is taken from them."""
    record = CorpusLayout(work.run.corpus).read_record()
    if record is None:
        return _estimated_sizes(work)
    if record.prompts:
        return {split: _with_answers(record.splits[split], work.recipe) for split in SPLITS}
    return {
        split: SplitSize(
            sequences=record.splits[split].sequences,
            tokens=record.splits[split].tokens,
            positions=record.splits[split].positions,
            counted=True,
        )
        for split in SPLITS
    }


def _with_answers(prompts: SplitRecord | SplitSize, recipe: Recipe, basis: str = "") -> SplitSize:
    """Upper limit for prompts with answers; only the teacher decides how long the answers are."""
    generate = recipe.teacher.generate
    longest = 0 if generate is None else prompts.sequences * generate.max_new_tokens
    room = prompts.sequences * recipe.corpus.sequence_length - prompts.tokens
    positions = max(0, min(longest, room))
    return SplitSize(
        sequences=prompts.sequences,
        tokens=prompts.tokens + positions,
        positions=positions,
        counted=False,
        basis=basis,
    )


def _estimated_sizes(work: Work) -> dict[Split, SplitSize]:
    estimate, basis = _estimate(work)
    found: dict[Split, SplitSize] = {}
    for split in SPLITS:
        size = SplitSize(
            sequences=round(estimate.sequences[split]),
            tokens=round(estimate.tokens[split]),
            positions=round(estimate.positions[split]),
            counted=False,
            basis=basis,
        )
        prompts = work.recipe.teacher.generate is not None
        found[split] = _with_answers(size, work.recipe, basis) if prompts else size
    return found


def _estimate(work: Work) -> tuple[Estimate, str]:
    """An estimate and its basis, in words."""
    from ...stages.corpus.estimate import BYTES_PER_TOKEN, Estimate, NoEstimateError, estimate

    config, prompts = work.recipe.corpus, work.recipe.teacher.generate is not None
    sources = list_sources(config.files, work.loaded.base)
    unknown = sum(source.format == "hub" for source in sources)
    without = f", without {unknown} of {len(sources)} sources that are not downloaded yet"
    without = without if unknown else ""
    folder, reason = _tokenizer_folder(work)
    if folder is not None:
        try:
            found = estimate(config, sources, folder, prompts=prompts)
        except NoEstimateError as error:
            reason = str(error)
        else:
            of = "all" if found.is_whole else "a sample of"
            return found, f"estimated from {of} {found.documents:,} documents{without}"
    try:
        found = estimate(config, sources, None, prompts=prompts)
    except NoEstimateError:
        tokens = sum(source.bytes for source in sources) / BYTES_PER_TOKEN
        counts: dict[Split, float] = {
            "train": tokens * (1 - config.holdout),
            "heldout": tokens * config.holdout,
        }
        sequences = {split: -(-counts[split] // config.sequence_length) for split in SPLITS}
        found = Estimate(0, False, sequences, counts, counts)
    return found, f"estimated with {BYTES_PER_TOKEN} bytes per token: {reason}{without}"


def tokens_in(work: Work, split: Split, folder: Path | None) -> float:
    """Supervised tokens of a split, estimated with the tokenizer in a folder, or all tokens of
    prompts that the teacher answers. None is the teacher's.

    Raises
        ColdstillError: the tokenizer or the corpus cannot be sampled, and why
    """
    from ...stages.corpus.estimate import estimate

    config, prompts = work.recipe.corpus, work.recipe.teacher.generate is not None
    if folder is None:
        folder, reason = _tokenizer_folder(work)
        if folder is None:
            raise ColdstillError(reason)
    sources = list_sources(config.files, work.loaded.base)
    found = estimate(config, sources, folder, prompts=prompts)
    return (found.tokens if prompts else found.positions)[split]


def _tokenizer_folder(work: Work) -> tuple[Path | None, str]:
    """Folder of the tokenizer on this machine, or None and the reason."""
    teacher = work.recipe.teacher
    if teacher.model is None:
        exists = work.run.tokenizer.exists()
        return (work.run.tokenizer if exists else None), "the tokenizer is not trained yet"
    try:
        work.local(teacher.model)
    except ColdstillError as error:
        return None, str(error)
    folder = folder_of(work, teacher.model, teacher.revision)
    return folder, f"the tokenizer of {teacher.model} is not on this machine"


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
    work: Work, corpus: dict[Split, SplitSize] | None = None, pilot: PilotRecord | None = None
) -> dict[Split, StoreSize]:
    """Sizes of both stores; reads manifests and commit records, but no data.

    corpus  sizes of the corpus, if known already
    pilot   record of the pilot, if read already
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
            head=logits.head, tail=logits.tail, temperatures=logits.temperatures, seed=recipe.seed
        ),
        "heldout": Capture(
            head=head,
            tail=0 if head == vocabulary else evaluation.tail,
            tail_logprobs=True,
            seed=recipe.seed,
        ),
    }


def expected_bytes(capture: Capture, codec: str) -> int:
    """Bytes per position. They depend on the data, but for a capture without samples in `plain`."""
    # draws of the whole distribution repeat its few likely tokens; measured: 7.4 different tokens
    # of 20 draws and 13.5 of 50 at an entropy of 2 nats, but 15.6 of 16 outside a head
    drawn = capture.tail if capture.head else capture.tail**0.67
    if codec == "compact":
        # measured: 1.1 to 1.5 bytes per entry, and 3 for the tokens and numbers beside it
        sample = 3.3 if capture.keeps_tail_logprobs else 1.5
        return round(3 + 1.2 * capture.head + sample * drawn + 4 * len(capture.temperatures))
    sample = 12 if capture.keeps_tail_logprobs else 8
    # 8 for the token, its position and the document borders; 12 for three numbers per position, and
    # 4 for the number of different samples
    beside = 8 + 12 + (4 if capture.tail else 0) + 4 * len(capture.temperatures)
    return round(beside + 8 * capture.head + sample * drawn)


def _store_size(split: Split, size: SplitSize, work: Work, pilot: PilotRecord | None) -> StoreSize:
    recipe, run = work.recipe, work.run
    logits = recipe.logits
    training = split == "train"
    place = place_at(run.logits if training else run.heldout)
    wanted = logits.sequences if training else recipe.evaluation.sequences
    sequences = min(wanted or size.sequences, size.sequences)
    positions = round(size.positions * sequences / max(1, size.sequences))
    each = shard_sequences(sequences, recipe.corpus.sequence_length, logits.shard_tokens)
    shards = -(-sequences // each)
    done = done_of(place)
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
class Done:
    """What exists of a store."""

    shards: int = 0
    sequences: int = 0
    positions: int = 0
    bytes: int = 0


def done_of(place: Place) -> Done:
    """The finished shards of a store, which may not exist yet."""
    if not place.exists(MANIFEST):
        return Done()
    manifest = read_manifest(place)
    done = finished_shards(place, manifest)
    chosen = done[:: -(-len(done) // _MOST_COMMITS) or 1]
    commits = [read_commit(place, manifest, index) for index in chosen]
    share = len(done) / max(1, len(commits))
    return Done(
        shards=len(done),
        sequences=sum(len(manifest.shard_rows(index)) for index in done),
        positions=round(share * sum(commit.positions for commit in commits)),
        bytes=round(share * sum(commit.bytes for commit in commits)),
    )


def expect_room(stores: Iterable[StoreSize]) -> None:
    """Refuse a capture that does not fit, before its teacher is loaded. Leaves no files.

    Adds up the missing bytes of the stores on each disk of this machine. A remote store is not
    checked.

    Raises
        ColdstillError: the missing shards do not fit, or their folder cannot be written
    """
    disks: dict[int, list[StoreSize]] = {}
    for store in stores:
        if store.folder is not None and store.bytes_missing:
            expect_writable(store.folder)
            disks.setdefault(existing(store.folder).stat().st_dev, []).append(store)
    for held in disks.values():
        needed = sum(store.bytes_missing for store in held)
        folders = [store.folder for store in held if store.folder is not None]
        free = free_bytes(folders[0])
        if needed > free:
            about = "" if all(store.counted and store.measured for store in held) else "about "
            raise ColdstillError(
                f"{' and '.join(map(str, folders))}: {about}{size(needed)} must still be written "
                f"and {size(free)} are free; free some space, move the store elsewhere with "
                "logits.path, or keep less: logits.head, logits.tail, logits.sequences"
            )


def expect_writable(folder: Path) -> None:
    """Test that a folder can be written; it may not exist yet.

    Raises
        ColdstillError: it cannot be written, and why
    """
    near = existing(folder)
    if not near.is_dir():
        raise ColdstillError(
            f"{folder}: cannot be created: {near} is a file; move it or choose another folder"
        )
    trial = near / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
    try:
        trial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process may have cleaned up
            trial.rmdir()
    except OSError as error:
        raise ColdstillError(
            f"{folder}: cannot be written: {error.strerror} in {near}; choose another folder with "
            "--runs or logits.path, or change its permissions"
        ) from error


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
