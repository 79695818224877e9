"""The steps of stage one: settle what is to be captured, load the teacher only if it must be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.places.claims import claimed
from ...data.places.local import LocalPlace
from ...data.places.opening import place_at
from ...data.prepared import SPLITS, CorpusLayout, CorpusRecord
from ...data.schema import Capture
from ..planning.room import expect_room, expect_writable
from ..planning.sizes import store_sizes
from .teacher import prepared, tell_left_out, tokenizer_of, train_missing_teacher
from .work import READ_TEACHER

if TYPE_CHECKING:
    from ...data.prepared import Split
    from ...data.store.manifest import TeacherIdentity
    from ...stages.capture.plan import CapturePlan
    from ...stages.capture.teacher import Teacher
    from ...stages.interruption import Interruption
    from .work import Work


def teacher_logits(work: Work) -> None:
    """Run the teacher over both splits; first train it if it is made here and is not yet.

    Any number of processes may do so at the same time, on one run: they share the work.

    Raises
        StoppedError: asked to stop by SIGTERM; what was begun is finished or dropped
    """
    from ...stages.interruption import Interruption

    interruption = Interruption()
    with interruption.listening():
        _teacher_logits(work, interruption)


def _teacher_logits(work: Work, interruption: Interruption) -> None:
    recipe, run = work.recipe, work.run
    from ...stages.capture.teacher import expect_several_processes
    from ...stages.models.isolation import packs
    from ...stages.teacher_logits import capture_split, is_captured

    if recipe.teacher.tensor_parallel:
        expect_several_processes("teacher.tensor_parallel")
    for store in map(place_at, (run.logits, run.heldout)):
        if isinstance(store, LocalPlace):  # before an hour is spent on the corpus
            expect_writable(store.root)
    # one process at a time, or several would make the same
    with claimed(run.preparing, wait=True):
        if recipe.teacher.is_trained_here:
            train_missing_teacher(work)
        tokenizer = tokenizer_of(work)
        tell_left_out(work, tokenizer, "teacher-logits")
        # before the corpus is read: what is wrong with the teacher should not cost that
        source = _source(work, tokenizer)
        record = prepared(work, tokenizer, together=recipe.corpus.pack)
    plans = _capture_plans(work, tokenizer, record, source)
    if all(is_captured(plan) for plan in plans):
        stores = f"{place_at(run.logits)} and {place_at(run.heldout)}"
        work.say("teacher-logits", f"complete: {stores}")
        return
    expect_room(store_sizes(work).values())
    name = f"teacher {source.identity.name}"
    teacher = loaded_teacher(work, tokenizer, name, "teacher-logits", together=record.together)
    if record.together and not packs(teacher.isolation):
        work.say(
            "teacher-logits",
            f"a {plans[0].teacher.family!r} model cannot keep packed documents apart: one document "
            "per sequence from here on",
        )
        with claimed(run.preparing, wait=True):
            record = prepared(work, tokenizer, together=False)
        plans = _capture_plans(work, tokenizer, record, source)
    # the small one first: what is wrong with a teacher shows there, at little cost
    for plan in reversed(plans):
        if not teacher.follows and is_captured(plan):
            work.say(f"teacher-logits {plan.split}", f"complete: {place_at(plan.folder)}")
            teacher.lead(None)
            continue
        with interruption.postponed():
            capture_split(plan, teacher, work.report, work.begin, stop=lambda: interruption.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What is to be captured from whom: known before the corpus is read."""

    identity: TeacherIdentity
    context: int | None
    captures: dict[Split, Capture]


def _source(work: Work, tokenizer: Any) -> _Source:
    from ...stages.capture.plan import expect_capturable
    from ...stages.models.identity import teacher_identity
    from ...stages.models.loading import context_length, expect_loadable, load_config
    from ...stages.models.vocabulary import vocabulary_size

    recipe = work.recipe
    logits, table = recipe.logits, recipe.teacher
    name, where, own_code = work.teacher_model, "teacher.model", table.trust_remote_code
    found = expect_loadable(name, where, table.revision, own_code=own_code)
    if found.other_parts:
        note = f"{name}: {found.other_parts:,} tensors that are not of its text model are left out"
        work.say("teacher-logits", note)
    work.doing("teacher-logits", READ_TEACHER)
    identity = teacher_identity(
        name, where, dtype=table.dtype, revision=table.revision, own_code=own_code
    )
    if table.is_trained_here:  # its folder is called the same in every run
        identity = dataclasses.replace(identity, name=recipe.trained_teacher)
    context = context_length(load_config(name, where, table.revision, own_code=own_code))
    size = vocabulary_size(tokenizer)
    heldout_head = min(recipe.evaluation.head, size)
    captures: dict[Split, Capture] = {
        "train": Capture(
            head=logits.head,
            tail=logits.tail,
            temperatures=logits.temperatures,
            seed=recipe.seed,
        ),
        "heldout": Capture(
            head=heldout_head,
            tail=recipe.evaluation.tail if heldout_head < size else 0,
            tail_logprobs=True,
            seed=recipe.seed,
        ),
    }
    for capture in captures.values():
        expect_capturable(capture, size, recipe.corpus.sequence_length, context)
    return _Source(identity=identity, context=context, captures=captures)


def _capture_plans(
    work: Work, tokenizer: Any, record: CorpusRecord, source: _Source
) -> list[CapturePlan]:
    from ...stages.capture.plan import CapturePlan, chosen_rows

    recipe, run = work.recipe, work.run
    logits = recipe.logits
    wanted = {"train": logits.sequences, "heldout": recipe.evaluation.sequences}
    folders = {"train": run.logits, "heldout": run.heldout}
    plans = []
    for split in SPLITS:
        sequences = CorpusLayout(run.corpus).open(split)
        plans.append(
            CapturePlan(
                split=split,
                teacher=source.identity,
                context=source.context,
                tokenizer=tokenizer,
                corpus=record,
                sequences=sequences,
                rows=chosen_rows(len(sequences), wanted[split], recipe.seed),
                capture=source.captures[split],
                sequence_length=recipe.corpus.sequence_length,
                shard_tokens=logits.shard_tokens,
                batch_tokens=logits.batch_tokens,
                # what everything is judged by is kept as it was; it is small
                codec=logits.codec if split == "train" else "plain",
                store=logits.store,
                folder=folders[split],
                generate=recipe.teacher.generate,
            )
        )
    return plans


def loaded_teacher(work: Work, tokenizer: Any, name: str, stage: str, *, together: bool) -> Teacher:
    """Load the recipe's teacher; `name` is for messages, `stage` for reports."""
    from ...stages.capture.teacher import Loading, load_teacher
    from ...stages.models.vocabulary import vocabulary_size

    table = work.recipe.teacher
    work.doing(stage, "load the teacher")
    loading = Loading(
        dtype=table.dtype,
        revision=table.revision,
        attention=table.attention,
        device_map=table.device_map,
        tensor_parallel=table.tensor_parallel,
        compiled=table.compile,
        own_code=table.trust_remote_code,
    )
    teacher = load_teacher(
        work.teacher_model,
        "teacher.model",
        loading,
        vocabulary=vocabulary_size(tokenizer),
        sequence_length=work.recipe.corpus.sequence_length,
        together=together,
        generate=table.generate is not None,
        report=work.report,
    )
    return dataclasses.replace(teacher, name=name)
