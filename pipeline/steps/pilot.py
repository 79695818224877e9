"""Runs the pilot of a recipe: some sequences are captured in several ways and measured."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import ColdstillError
from ...data.files import write_json
from ...data.places.claims import claimed
from ...data.schema import Capture
from ...data.store.manifest import TeacherIdentity
from ...data.store.writer import BLOCK_TOKENS
from ..planning.pilot_record import PilotRecord, PilotRow, pilot_settings
from ..planning.sizes import captures
from .capture import CheckedTeacher, capture_plans, loaded_teacher
from .teacher import prepared, report_left_out, tokenizer_of

if TYPE_CHECKING:
    from ...data.prepared import CorpusRecord
    from ...stages.capture.plan import CapturePlan
    from ..recipe.work import Work

_CAPTURES = ((0, 12), (0, 24), (8, 8), (16, 16), (4, 20), (50, 0), (64, 0))
"""(head, tail) measured in addition to the recipe's own and the default."""
_SHARD_BLOCKS = 4
"""Blocks in a shard. Real shards are longer, but all ways are kept in memory at once."""
_NO_IDENTITY = TeacherIdentity(
    name="pilot", fingerprint="", family="", dtype="", parameters=0, bytes=0
)
"""Shards of a pilot are only counted; a real identity needs a pass over the teacher's weights."""


def run_pilot(work: Work, count: int) -> PilotRecord:
    """Run the teacher over a sample of `count` sequences; the figures are also kept in the run.

    Writes to no store of the run.

    Raises
        ColdstillError: the corpus has fewer sequences, or the teacher is not trained yet, cannot be
            loaded or is split across processes
    """
    from ...stages.capture.plan import expect_capturable
    from ...stages.capture.teacher import Teacher
    from ...stages.models.isolation import packs
    from ...stages.models.loading import context_length, expect_loadable, load_config
    from ...stages.models.vocabulary import vocabulary_size
    from ...stages.planning import pilot as stage

    recipe, run, table = work.recipe, work.run, work.recipe.teacher
    if table.tensor_parallel:
        raise ColdstillError(
            "teacher.tensor_parallel: a pilot is one process; run it with "
            "--set teacher.tensor_parallel=false --set teacher.device_map=auto"
        )
    if table.url is not None:
        raise ColdstillError(
            "teacher.url: a pilot compares records with whole distributions, which a server does "
            "not send; plan without --pilot"
        )
    if table.is_trained_here and not run.teacher_model.exists():
        raise ColdstillError(
            f"{run.teacher_model}: the teacher is not trained yet, so there is nothing to measure; "
            f"train it first with coldstill train-teacher {work.named}"
        )
    tokenizer = tokenizer_of(work)
    report_left_out(work, tokenizer, stage.STAGE)
    # before the corpus is read, which takes long: everything that can be refused already
    where = (work.teacher_model, "teacher.model", table.revision)
    expect_loadable(*where, own_code=table.trust_remote_code)
    context = context_length(load_config(*where, own_code=table.trust_remote_code))
    own, length = captures(recipe)["train"], recipe.corpus.sequence_length
    expect_capturable(own, vocabulary_size(tokenizer), length, context)
    record = _prepared(work, tokenizer, count, together=recipe.corpus.pack)
    name = recipe.trained_teacher if table.is_trained_here else table.model
    teacher = loaded_teacher(
        work, tokenizer, f"teacher {name}", stage.STAGE, together=record.together
    )
    assert isinstance(teacher, Teacher)
    if record.together and not packs(teacher.isolation):
        record = _prepared(work, tokenizer, count, together=False)
    with (
        contextlib.closing(teacher),
        tempfile.TemporaryDirectory(prefix="coldstill-pilot-") as scratch,
    ):
        plans = _plans(work, tokenizer, record, count, context)
        figures = stage.run_pilot(plans, teacher, Path(scratch), work.report)
    pilot = PilotRecord(
        settings=pilot_settings(recipe),
        sequences=figures.sequences,
        positions=figures.positions,
        tokens_per_second=figures.tokens_per_second,
        machine=figures.machine,
        covered_mass={str(size): mass for size, mass in figures.covered_mass.items()},
        captures=[
            PilotRow(
                head=plan.capture.head,
                tail=plan.capture.tail,
                codec=plan.codec,
                bytes_per_position=way.bytes_per_position,
                kl=way.kl,
                angle=way.quality.angle,
                norm_ratio=way.quality.norm_ratio,
                relative_error=way.quality.relative_error,
                gradient_error=way.gradient_error,
            )
            for plan, way in zip(plans, figures.ways, strict=True)
        ],
    )
    write_json(run.pilot, asdict(pilot))
    return pilot


def _prepared(work: Work, tokenizer: Any, count: int, *, together: bool) -> CorpusRecord:
    with claimed(work.run.preparing, wait=True):  # a capture may be preparing the same corpus
        record = prepared(work, tokenizer, together=together)
    available = record.splits["train"].sequences
    most = min(available, work.recipe.logits.sequences or available)
    if count > most:
        raise ColdstillError(
            f"--pilot {count}: there are {most:,} sequences to capture; choose at most this number"
        )
    return record


def _plans(
    work: Work, tokenizer: Any, record: CorpusRecord, count: int, context: int | None
) -> list[CapturePlan]:
    """A plan for each capture and codec, the recipe's own first, on the same sampled sequences."""
    from ...stages.models.vocabulary import vocabulary_size

    recipe, logits = work.recipe, work.recipe.logits
    vocabulary = vocabulary_size(tokenizer)
    checked = CheckedTeacher(
        identity=_NO_IDENTITY, context=context, captures=captures(recipe, vocabulary)
    )
    train = capture_plans(work, tokenizer, record, checked)[0]
    random = np.random.Generator(np.random.PCG64([recipe.seed, 2]))
    chosen = random.choice(len(train.rows), count, replace=False)
    own = dataclasses.replace(
        train,
        rows=np.array([train.rows[i] for i in np.sort(chosen).tolist()], dtype=np.int64),
        shard_tokens=min(logits.shard_tokens, _SHARD_BLOCKS * BLOCK_TOKENS),
    )
    other = "compact" if logits.codec_name == "plain" else "plain"
    own_capture = own.capture
    pairs = dict.fromkeys([*_CAPTURES, (Capture().head, Capture().tail)])
    return [
        own,
        dataclasses.replace(own, codec=other),
        *[
            dataclasses.replace(own, capture=dataclasses.replace(own_capture, head=head, tail=tail))
            for head, tail in pairs
            if (head, tail) != (own_capture.head, own_capture.tail)
            and (head < vocabulary or (head == vocabulary and not tail))
        ],
    ]
