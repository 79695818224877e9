"""Size of a corpus: counted once it is prepared, before that estimated from a sample of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.prepared import SPLITS, CorpusLayout
from .models import folder_of

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.prepared import Split, SplitRecord
    from ...stages.corpus.estimate import Estimate
    from ..recipe.tables import Recipe
    from ..recipe.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSize:
    """Size of one split of a corpus."""

    sequences: int
    tokens: int
    positions: int
    """Supervised positions."""
    counted: bool
    """Whether the numbers are counted and not estimated."""
    basis: str = ""
    """What the estimate is based on, for the user; empty if counted."""


def corpus_sizes(work: Work) -> dict[Split, SplitSize]:
    """Sizes of both splits, before a sample is taken from them.

    Raises
        ColdstillError: sources do not exist
    """
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
