"""The step of stage one: plan both captures, and load the teacher only if shards are missing."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.places.claims import claimed
from ...data.places.local import LocalPlace
from ...data.places.place import place_at
from ...data.prepared import SPLITS, CorpusLayout, CorpusRecord
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...data.store.reader import is_complete
from ...stages.config import ServerOptions
from ..planning.sizes import captures, expect_room, expect_writable, store_sizes
from ..planning.teachable import expect_teachable_students
from ..recipe.work import READ_TEACHER
from .teacher import prepared, prepared_apart, report_left_out, tokenizer_of, train_missing_teacher

if TYPE_CHECKING:
    from ...data.prepared import Split
    from ...data.schema import Capture
    from ...data.store.manifest import TeacherIdentity
    from ...stages.capture.plan import CapturePlan
    from ...stages.capture.teacher import AnyTeacher
    from ...stages.interruption import Interruption
    from ...stages.models.inputs import Isolation
    from ..recipe.work import Work


def teacher_logits(work: Work, *, other_engine: bool = False) -> None:
    """Run the teacher over both splits; trains it first if the recipe asks for it.

    Several processes can do this for one run at the same time; they share the work.

    other_engine  continue stores that another engine of the teacher began

    Raises
        StoppedError: SIGTERM arrived; the current shard is finished or dropped
    """
    from ...stages.interruption import Interruption

    interruption = Interruption()
    with interruption.listening():
        _teacher_logits(work, interruption, other_engine)


def _teacher_logits(work: Work, interruption: Interruption, other_engine: bool) -> None:
    from ...stages.teacher_logits import capture_split, is_captured

    if work.recipe.teacher.tensor_parallel:
        from ...stages.capture.teacher import expect_several_processes

        expect_several_processes()
    base = capture_base(work, other_engine=other_engine)
    if base.is_complete(work):
        return
    teacher, plans = teacher_and_plans(work, base)
    with contextlib.closing(teacher):
        # the small store first, so that a wrong teacher is found at little cost
        for plan in reversed(plans):
            if not teacher.follows and is_captured(plan):
                work.note(f"teacher-logits {plan.split}", f"complete: {place_at(plan.folder)}")
                teacher.lead(None)
                continue
            with interruption.postponed():
                capture_split(
                    plan, teacher, work.report, work.begin, stop=lambda: interruption.asked
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBase:
    """What is known before the teacher is loaded."""

    tokenizer: Any
    checked: CheckedTeacher
    record: CorpusRecord
    other_engine: bool = False
    """Whether stores that another engine began are continued."""

    def plans(self, work: Work) -> list[CapturePlan]:
        """The plans of both splits, `train` first."""
        return capture_plans(
            work, self.tokenizer, self.record, self.checked, other_engine=self.other_engine
        )

    def is_complete(self, work: Work) -> bool:
        """Whether both stores are complete, which is reported; otherwise they must have room.

        Raises
            ColdstillError: a store was made differently, or the disk is too small
        """
        from ...stages.teacher_logits import is_captured

        if all(is_captured(plan) for plan in self.plans(work)):
            stores = f"{place_at(work.run.logits)} and {place_at(work.run.heldout)}"
            work.note("teacher-logits", f"complete: {stores}")
            return True
        expect_room(store_sizes(work).values())
        return False


def capture_base(work: Work, *, other_engine: bool = False) -> CaptureBase:
    """Prepare the corpus, after every check that needs no teacher in memory.

    other_engine  as in `CaptureBase`
    """
    recipe, run = work.recipe, work.run
    stores = [place_at(run.logits), place_at(run.heldout)]
    for store in stores:  # before time is spent on the corpus
        if isinstance(store, LocalPlace):
            expect_writable(store.root)
    if not all(map(is_complete, stores)):
        expect_teachable_students(work)
    # one process at a time, so that the corpus is prepared once
    with claimed(run.preparing, wait=True):
        if recipe.teacher.is_trained_here:
            train_missing_teacher(work)
        tokenizer = tokenizer_of(work)
        report_left_out(work, tokenizer, "teacher-logits")
        # checked before the corpus is read, which can take long
        checked = checked_teacher(work, tokenizer)
        record = prepared(work, tokenizer, together=recipe.corpus.pack)
    return CaptureBase(
        tokenizer=tokenizer, checked=checked, record=record, other_engine=other_engine
    )


def teacher_and_plans(work: Work, base: CaptureBase) -> tuple[AnyTeacher, list[CapturePlan]]:
    """Load the teacher, and return it with the plans of both splits, `train` first."""
    name = f"teacher {base.checked.identity.name}"
    together = base.record.together
    teacher = loaded_teacher(work, base.tokenizer, name, "teacher-logits", together=together)
    try:
        return teacher, plans_for(work, base, teacher.isolation)
    except BaseException:
        teacher.close()
        raise


def plans_for(work: Work, base: CaptureBase, isolation: Isolation) -> list[CapturePlan]:
    """Return the plans of both splits; the corpus is prepared again if this teacher cannot keep
    packed documents apart."""
    from ...stages.models.isolation import packs

    if base.record.together and not packs(isolation):
        with claimed(work.run.preparing, wait=True):
            family = base.checked.identity.family
            record = prepared_apart(work, base.tokenizer, family, "teacher-logits")
        base = dataclasses.replace(base, record=record)
    return base.plans(work)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTeacher:
    """What is known of the teacher before the corpus is read."""

    identity: TeacherIdentity
    context: int | None
    """Longest input in tokens, if limited."""
    captures: dict[Split, Capture]


def checked_teacher(work: Work, tokenizer: Any) -> CheckedTeacher:
    """Check what can be checked without the teacher's weights in memory.

    Raises
        ColdstillError: the teacher cannot be loaded, or not captured as the recipe asks
    """
    from ...stages.capture.plan import expect_capturable
    from ...stages.models.loading import (
        context_length,
        expect_loadable,
        load_config,
        teacher_identity,
    )
    from ...stages.models.vocabulary import vocabulary_size

    recipe, table = work.recipe, work.recipe.teacher
    name, where, own_code = work.teacher_model, "teacher.model", table.trust_remote_code
    if table.url is not None:
        identity = _served_identity(work, table.url)
    else:
        found = expect_loadable(name, where, table.revision, own_code=own_code)
        if found.other_parts:
            note = f"{name}: {found.other_parts:,} tensors outside its text model are not used"
            work.note("teacher-logits", note)
        work.doing("teacher-logits", READ_TEACHER)
        identity = teacher_identity(
            name, where, dtype=table.dtype, revision=table.revision, own_code=own_code
        )
    if table.engine == "vllm":
        from ...stages.models.engines import ENGINES, engine_identity

        # complete stores need no engine; whether they are is known after the corpus
        stores = map(place_at, (work.run.logits, work.run.heldout))
        if not all(store.exists(MANIFEST) for store in stores):
            ENGINES[table.engine].expect_installed()
        identity = dataclasses.replace(
            identity, engine=engine_identity(table.engine, table.engine_options)
        )
    if table.is_trained_here:  # its folder has the same name in every run
        identity = dataclasses.replace(identity, name=recipe.trained_teacher)
    context = context_length(load_config(name, where, table.revision, own_code=own_code))
    size = vocabulary_size(tokenizer)
    wanted = captures(recipe, size)
    for capture in wanted.values():
        expect_capturable(capture, size, recipe.corpus.sequence_length, context)
    return CheckedTeacher(identity=identity, context=context, captures=wanted)


def _served_identity(work: Work, url: str) -> TeacherIdentity:
    """The identity of a served teacher; complete stores know it, and then no server is asked."""
    from ...stages.capture.served import served_identity, what_is_served
    from ...stages.models.engines.server import NAME, Served

    stores = map(place_at, (work.run.logits, work.run.heldout))
    engines = [read_manifest(store).teacher.engine for store in stores if is_complete(store)]
    if len(engines) == len(SPLITS) and (engine := engines[0]) and engine.name == NAME:
        name = work.recipe.teacher.engine_options.get("model") or engine.options["model"]
        served = Served(name=str(name), version=engine.version)
    else:
        work.doing("teacher-logits", "ask the server")
        options = ServerOptions(**work.recipe.teacher.engine_options)
        served = what_is_served(url, options, "teacher-logits", work.report)
    return served_identity(work.teacher_model, _described(work), served)


def _described(work: Work) -> Any:
    from ...stages.models.loading import described_model

    table = work.recipe.teacher
    return described_model(
        work.teacher_model, "teacher.model", table.revision, own_code=table.trust_remote_code
    )


def capture_plans(
    work: Work,
    tokenizer: Any,
    record: CorpusRecord,
    checked: CheckedTeacher,
    *,
    other_engine: bool = False,
) -> list[CapturePlan]:
    """Return the plans of both splits, `train` first."""
    from ...stages.capture.plan import chosen_rows

    recipe, run = work.recipe, work.run
    wanted = {"train": recipe.logits.sequences, "heldout": recipe.evaluation.sequences}
    folders = {"train": run.logits, "heldout": run.heldout}
    plans = []
    for split in SPLITS:
        sequences = CorpusLayout(run.corpus).open(split)
        plans.append(
            plan_of(
                work,
                tokenizer,
                checked,
                record,
                split=split,
                sequences=sequences,
                rows=chosen_rows(len(sequences), wanted[split], recipe.seed),
                capture=checked.captures[split],
                sequence_length=recipe.corpus.sequence_length,
                folder=folders[split],
                generate=recipe.teacher.generate,
                other_engine=other_engine,
            )
        )
    return plans


def plan_of(
    work: Work, tokenizer: Any, checked: CheckedTeacher, record: CorpusRecord, **own: Any
) -> CapturePlan:
    """Return the plan of one store of the recipe's teacher; `own` are its remaining fields."""
    from ...stages.capture.plan import CapturePlan

    logits = work.recipe.logits
    return CapturePlan(
        teacher=checked.identity,
        context=checked.context,
        tokenizer=tokenizer,
        corpus=record,
        shard_tokens=logits.shard_tokens,
        batch_tokens=logits.batch_tokens,
        # the held-out store is small, so it is stored without loss
        codec=logits.codec if own["split"] == "train" else "plain",
        store=logits.store,
        **own,
    )


def loaded_teacher(
    work: Work, tokenizer: Any, name: str, stage: str, *, together: bool
) -> AnyTeacher:
    """Load the recipe's teacher, or connect to it; `name` is for messages, `stage` for reports."""
    from ...stages.capture.served import connect
    from ...stages.capture.teacher import Loading, load_teacher
    from ...stages.models.vocabulary import vocabulary_size

    table = work.recipe.teacher
    if table.url is not None:
        served = connect(
            _described(work),
            tokenizer,
            url=table.url,
            options=ServerOptions(**table.engine_options),
            vocabulary=vocabulary_size(tokenizer),
            sequence_length=work.recipe.corpus.sequence_length,
            stage=stage,
            report=work.report,
        )
        return dataclasses.replace(served, name=name)
    work.doing(stage, "load the teacher")
    loading = Loading(
        dtype=table.dtype,
        revision=table.revision,
        attention=table.attention,
        device_map=table.device_map,
        tensor_parallel=table.tensor_parallel,
        compiled=table.compile,
        own_code=table.trust_remote_code,
        engine=table.engine,
        engine_options=table.engine_options,
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
