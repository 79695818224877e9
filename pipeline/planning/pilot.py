"""The pilot: some sequences of a recipe's capture, measured before the teacher is paid for all."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import ColdstillError
from ...data.files import write_json
from ...data.places.claims import claimed
from ...data.prepared import CorpusLayout
from ...data.schema import Capture
from ...data.store.manifest import (
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    TokenizerIdentity,
    format_settings,
)
from ..steps.teacher import prepared, tell_left_out, tokenizer_of
from .pilot_record import pilot_settings
from .sizes import captures

if TYPE_CHECKING:
    from ...data.prepared import CorpusRecord
    from ...stages.capture.teacher import Teacher
    from ...stages.planning.pilot import PilotFigures
    from ..recipe.tables import Recipe
    from ..steps.work import Work

Row = dict[str, Any]
Way = tuple[Capture, "str | dict[str, Any]"]
"""A capture and a codec, as the recipe writes it."""

_CAPTURES = ((0, 12), (0, 24), (8, 8), (16, 16), (4, 20), (50, 0), (64, 0))
"""(head, tail) measured beside the recipe's own and the default."""
_SHARD_BLOCKS = 4
"""Blocks are as long as a real store's; shards are shorter, since all ways are held at once."""


def pilot(work: Work, count: int) -> Row:
    """Run the teacher over a sample of sequences; the figures, also kept in the run.

    Never touches a store of the run.

    count  how many sequences

    Raises
        ColdstillError: more than there are, a teacher that is not trained yet, cannot be loaded or
            is cut across processes
    """
    from ...stages.capture.plan import chosen_rows
    from ...stages.models.isolation import packs
    from ...stages.models.loading import expect_loadable
    from ...stages.planning.pilot import PilotPlan, run_pilot

    recipe, run = work.recipe, work.run
    if recipe.teacher.tensor_parallel:
        raise ColdstillError(
            "teacher.tensor_parallel: a pilot is one process; run it with "
            "--set teacher.tensor_parallel=false --set teacher.device_map=auto"
        )
    if recipe.teacher.is_trained_here and not run.teacher_model.exists():
        raise ColdstillError(
            f"{run.teacher_model}: the teacher is not trained yet, so there is nobody to ask; "
            f"train it first with coldstill train-teacher {work.named}"
        )
    tokenizer = tokenizer_of(work)
    tell_left_out(work, tokenizer, "pilot")
    expect_loadable(  # before the corpus is read: what is wrong should not cost that
        work.teacher_model,
        "teacher.model",
        recipe.teacher.revision,
        own_code=recipe.teacher.trust_remote_code,
    )
    with claimed(run.preparing, wait=True):  # a capture may be preparing the same
        record = prepared(work, tokenizer, together=recipe.corpus.pack)
    _expect_so_many(count, record, recipe)
    work.doing("pilot", "load the teacher")
    teacher = _load_teacher(work, tokenizer, together=record.together)
    if record.together and not packs(teacher.isolation):
        with claimed(run.preparing, wait=True):
            record = prepared(work, tokenizer, together=False)
        _expect_so_many(count, record, recipe)
    sequences = CorpusLayout(run.corpus).open("train")
    rows = chosen_rows(len(sequences), recipe.logits.sequences, recipe.seed)
    random = np.random.Generator(np.random.PCG64([recipe.seed, 2]))
    chosen = np.sort(random.choice(rows, count, replace=False))
    with tempfile.TemporaryDirectory(prefix="coldstill-pilot-") as scratch:
        ways = _ways(recipe, teacher.head.vocabulary)
        plan = PilotPlan(
            sequences=sequences,
            rows=chosen,
            manifests=tuple(
                _manifest(recipe, record, teacher, count, capture, codec) for capture, codec in ways
            ),
            batch_tokens=recipe.logits.batch_tokens,
            tokenizer=tokenizer,
            generate=recipe.teacher.generate,
        )
        figures = run_pilot(plan, teacher, Path(scratch), work.report)
    measured = {"settings": pilot_settings(recipe), **_as_json(figures, ways)}
    write_json(run.pilot, measured)
    return measured


def recommended(measured: Row, recipe: Recipe, budget: float | None) -> Row | None:
    """The capture with the smallest gradient error that fits, or None if none does.

    budget  bytes a position; those of the recipe's own capture unless given
    """
    rows = [row for row in measured["captures"] if row["codec"] == recipe.logits.codec]
    most = own_row(measured, recipe)["bytes_per_position"] if budget is None else budget
    fitting = [row for row in rows if row["bytes_per_position"] <= most]
    return min(
        fitting, key=lambda row: (row["gradient_error"], row["bytes_per_position"]), default=None
    )


def own_row(measured: Row, recipe: Recipe) -> Row:
    """The figures of the recipe's own capture."""
    wanted = (recipe.logits.head, recipe.logits.tail, recipe.logits.codec)
    rows: list[Row] = measured["captures"]
    return next(row for row in rows if (row["head"], row["tail"], row["codec"]) == wanted)


def _expect_so_many(count: int, record: CorpusRecord, recipe: Recipe) -> None:
    there = record.splits["train"].sequences
    most = min(there, recipe.logits.sequences or there)
    if count > most:
        raise ColdstillError(
            f"--pilot {count}: there are {most:,} sequences to capture; ask for at most so many"
        )


def _ways(recipe: Recipe, vocabulary: int) -> list[Way]:
    """What is measured, the recipe's own way first; all captures with its codec, its own capture
    with the other one too."""
    own = captures(recipe)["train"]
    pairs = dict.fromkeys([(own.head, own.tail), *_CAPTURES, (Capture().head, Capture().tail)])
    ways: list[Way] = [
        (dataclasses.replace(own, head=head, tail=tail), recipe.logits.codec)
        for head, tail in pairs
        if head < vocabulary or (head == vocabulary and not tail)
    ]
    other = "compact" if recipe.logits.codec_name == "plain" else "plain"
    return [ways[0], (own, other), *ways[1:]]


def _manifest(
    recipe: Recipe,
    record: CorpusRecord,
    teacher: Teacher,
    sequences: int,
    capture: Capture,
    codec: str | dict[str, Any],
) -> Manifest:
    """Of a store that nobody will open: only what decides its bytes is real."""
    from ...data.store.writer import BLOCK_TOKENS
    from ...stages.models.isolation import recorded

    length, size = recipe.corpus.sequence_length, teacher.head.vocabulary
    settings = format_settings(codec, recipe.logits.store, size, capture)
    block = max(1, BLOCK_TOKENS // length)
    per_shard = max(1, recipe.logits.shard_tokens // length)
    return Manifest(
        teacher=TeacherIdentity(
            name="pilot", fingerprint="", family="", dtype="", parameters=0, bytes=0
        ),
        tokenizer=TokenizerIdentity(fingerprint="", size=size),
        corpus=CorpusIdentity(fingerprint="", split="train", documents=0),
        packing=Packing(
            sequence_length=length,
            together=record.together,
            isolation=recorded(teacher.isolation),
            separator=tuple(record.separator),
            fingerprint="",
        ),
        capture=capture,
        sequences=sequences,
        shard_sequences=min(per_shard, _SHARD_BLOCKS * block),
        block_sequences=min(per_shard, block),
        codec=settings["codec"],
        store=settings["store"],
    )


def _load_teacher(work: Work, tokenizer: Any, *, together: bool) -> Teacher:
    from ...stages.capture.loading import Loading, load_teacher
    from ...stages.capture.plan import expect_capturable
    from ...stages.models.loading import context_length
    from ...stages.models.vocabulary import vocabulary_size

    table, length = work.recipe.teacher, work.recipe.corpus.sequence_length
    size, own = vocabulary_size(tokenizer), captures(work.recipe)["train"]
    expect_capturable(own, size, length, None)  # before anything is loaded
    trained_here = table.model is None or table.is_trained_here
    loading = Loading(
        dtype=table.dtype,
        revision=table.revision,
        attention=table.attention,
        device_map=table.device_map,
        compiled=table.compile,
        own_code=table.trust_remote_code,
    )
    name = work.recipe.trained_teacher if trained_here else str(table.model)
    teacher = load_teacher(
        str(work.run.teacher_model) if trained_here else work.local(str(table.model)),
        "teacher.model",
        loading,
        vocabulary=size,
        sequence_length=length,
        together=together,
        generate=table.generate is not None,
        report=work.report,
    )
    expect_capturable(own, size, length, context_length(teacher.head.model.config))
    return dataclasses.replace(teacher, name=f"teacher {name}")


def _as_json(figures: PilotFigures, ways: list[Way]) -> Row:
    """As they are kept in the run."""
    return {
        "sequences": figures.sequences,
        "positions": figures.positions,
        "tokens_per_second": figures.tokens_per_second,
        "machine": figures.machine,
        "covered_mass": {str(size): mass for size, mass in figures.covered_mass.items()},
        "captures": [
            {
                "head": capture.head,
                "tail": capture.tail,
                "codec": codec,
                "bytes_per_position": way.bytes_per_position,
                "kl": way.kl,
                "angle": way.quality.angle,
                "norm_ratio": way.quality.norm_ratio,
                "relative_error": way.quality.relative_error,
                "gradient_error": way.gradient_error,
            }
            for (capture, codec), way in zip(ways, figures.ways, strict=True)
        ],
    }
