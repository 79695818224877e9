"""How large a corpus will be, told before it is prepared from a sample of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.corpus import list_sources
from ...data.errors import ColdstillError
from ...data.prepared import SPLITS
from ...stages.report import silent
from ..steps.work import Work
from .split_size import SplitSize, answered

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.corpus import Source
    from ...data.prepared import Split
    from ...stages.corpus.estimate import Estimate
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run

_known: dict[str, tuple[Estimate, str]] = {}
"""Estimates of this process: a plan asks several times for one."""


def expected_sizes(loaded: LoadedRecipe, run: Run) -> dict[Split, SplitSize]:
    """Both splits, estimated from a sample; `basis` says how.

    Raises
        ColdstillError: sources that are not there
    """
    recipe = loaded.recipe
    sources = list_sources(recipe.corpus.files, loaded.base)
    key = repr((recipe.corpus, recipe.teacher, loaded.base, run.root, sources))
    if key not in _known:
        _known[key] = _estimated(loaded, run, sources)
    estimate, basis = _known[key]
    found: dict[Split, SplitSize] = {}
    for split in SPLITS:
        size = SplitSize(
            sequences=round(estimate.sequences[split]),
            tokens=round(estimate.tokens[split]),
            positions=round(estimate.positions[split]),
            counted=False,
            basis=basis,
        )
        found[split] = size if recipe.teacher.generate is None else answered(size, recipe, basis)
    return found


def _estimated(loaded: LoadedRecipe, run: Run, sources: list[Source]) -> tuple[Estimate, str]:
    from ...stages.corpus.estimate import BYTES_PER_TOKEN, Estimate, NoEstimateError, estimate

    unknown = sum(source.format == "hub" for source in sources)
    without = f", without {unknown} of {len(sources)} sources that are not fetched yet"
    without = without if unknown else ""
    config, prompts = loaded.recipe.corpus, loaded.recipe.teacher.generate is not None
    folder, why_not = _tokenizer(loaded, run)
    if folder is not None:
        try:
            found = estimate(config, sources, folder, prompts=prompts)
        except NoEstimateError as error:
            why_not = str(error)
        else:
            of = "all" if found.is_whole else "a sample of"
            return found, f"estimated from {of} {found.documents:,} documents{without}"
    assumed = f"{BYTES_PER_TOKEN} bytes a token are assumed, for the corpus is not tokenised yet"
    try:
        found = estimate(config, sources, None, prompts=prompts)
    except NoEstimateError:
        tokens = sum(source.bytes for source in sources) / BYTES_PER_TOKEN
        shares = {"train": 1 - config.holdout, "heldout": config.holdout}
        counts = {split: tokens * shares[split] for split in SPLITS}
        sequences = {split: -(-counts[split] // config.sequence_length) for split in SPLITS}
        found = Estimate(0, False, sequences, counts, counts)
    return found, f"{assumed}: {why_not}{without}"


def _tokenizer(loaded: LoadedRecipe, run: Run) -> tuple[Path | None, str]:
    """Where the tokenizer lies on this machine, or why it does not."""
    from ...stages.planning.model_sizes import model_folder

    teacher = loaded.recipe.teacher
    if teacher.model is None:
        there = run.tokenizer.exists()
        return (run.tokenizer if there else None), "its tokenizer is not trained yet"
    try:
        folder = model_folder(Work(loaded, run, silent).local(teacher.model), teacher.revision)
    except ColdstillError as error:
        return None, str(error)
    return folder, f"the tokenizer of {teacher.model} is not on this machine"
