"""What both stages need: the tokenizer, the prepared corpus, and a teacher that is trained here."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.places.place import place_at
from ...data.prepared import CorpusLayout, CorpusRecord
from ...data.schema import Capture
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...stages.config import sequences_in
from ..planning.checks import expect_trainable
from ..planning.models import named_teacher, tokenizer_of_model
from ..recipe.work import READ_TEACHER, beginning, is_done

if TYPE_CHECKING:
    from ...data.store.manifest import TeacherIdentity
    from ...stages.evaluation.quality import Heldout
    from ..recipe.run_folder import Run
from ..recipe.work import Work


def train_teacher(work: Work) -> None:
    """Train the tokenizer and a new teacher, or correct an existing teacher, as the recipe asks."""
    teacher = work.recipe.teacher
    if not teacher.is_trained_here:
        work.note("train-teacher", f"nothing to train: the teacher is {teacher.model}")
    elif not train_missing_teacher(work, asked=True):
        work.note("train-teacher", f"already trained: {work.run.teacher_model}")


def train_missing_teacher(work: Work, *, asked: bool = False) -> bool:
    """Train the teacher unless it is trained; return whether it was trained now.

    asked  whether the user asked for this step, and not for a later one

    Raises
        ColdstillError: several processes would each train it on the way to a later step
    """
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared and not asked and not work.run.teacher_model.exists():
        raise ColdstillError(
            f"{work.run.teacher_model}: the teacher is not trained yet, and several processes "
            "cannot train it in this step; train it first with coldstill train-teacher "
            f"{work.named}"
        )
    expect_trainable(work.recipe, (), teacher=not work.run.teacher_model.exists())
    made_here = work.recipe.teacher.model is None
    return _make_teacher(work) if made_here else _correct_teacher(work)


def _make_teacher(work: Work) -> bool:
    recipe, run = work.recipe, work.run
    teacher = recipe.teacher
    assert teacher.architecture is not None
    assert teacher.train is not None
    tokenizer = tokenizer_of(work)
    record = prepared(work, tokenizer, together=recipe.corpus.pack)
    settings = {
        "architecture": dataclasses.asdict(teacher.architecture),
        **_training_settings(work, record),
    }
    if is_done(run.teacher_settings, run.teacher_model, settings, "teacher", "name = NEW"):
        return False
    from ...stages.train_teacher import train_teacher as train

    train(
        run.teacher,
        teacher.architecture,
        teacher.train,
        tokenizer,
        CorpusLayout(run.corpus).open("train"),
        sequence_length=recipe.corpus.sequence_length,
        together=record.together,
        seed=settings["seed"],
        separator=record.separator,
        heldout=_heldout(work),
        report=work.report,
        begin=beginning(work, run.teacher_settings, settings),
        settings=settings,
    )
    return True


def _correct_teacher(work: Work) -> bool:
    recipe, run = work.recipe, work.run
    teacher = recipe.teacher
    assert teacher.train is not None
    tokenizer = tokenizer_of(work)
    # checked before the corpus is read and the teacher is trained
    base = _correctable(work, tokenizer)
    record = prepared(work, tokenizer, together=recipe.corpus.pack)
    settings = _correction_settings(work, base, record)
    if is_done(run.teacher_settings, run.teacher_model, settings, "teacher", "name = NEW"):
        return False
    _expect_uncaptured(run, base)
    from ...stages.models.isolation import choose_isolation, packs
    from ...stages.models.vocabulary import vocabulary_size
    from ...stages.train_teacher import Correction, correct_teacher

    model = _load_base(work)
    length = recipe.corpus.sequence_length
    isolation = choose_isolation(
        model,
        vocabulary_size(tokenizer),
        length,
        together=record.together,
        where="teacher.model",
        report=work.report,
    )
    if record.together and not packs(isolation):
        record = prepared_apart(work, tokenizer, base.family, "train-teacher")
        settings = _correction_settings(work, base, record)
    job = Correction(
        model=model,
        tokenizer=tokenizer,
        isolation=isolation,
        lora=teacher.lora,
        config=teacher.train,
        sequences=CorpusLayout(run.corpus).open("train"),
        heldout=_heldout(work),
        sequence_length=length,
        seed=settings["seed"],
        separator=record.separator,
        folder=run.teacher,
        record=run.correction,
        begin=beginning(work, run.teacher_settings, settings),
        settings=settings,
    )
    correct_teacher(job, work.report)
    return True


def _training_settings(work: Work, record: CorpusRecord) -> dict[str, Any]:
    train = work.recipe.teacher.train
    assert train is not None
    return {
        "train": dataclasses.asdict(train),
        "seed": work.recipe.seed if train.seed is None else train.seed,
        "corpus": record.splits["train"].packing,
    }


def _correction_settings(work: Work, base: TeacherIdentity, record: CorpusRecord) -> dict[str, Any]:
    lora = work.recipe.teacher.lora
    return {
        # its name and its folder may change, its weights may not
        "model": {"family": base.family, "fingerprint": base.fingerprint},
        "lora": None if lora is None else dataclasses.asdict(lora),
        **_training_settings(work, record),
    }


def _correctable(work: Work, tokenizer: Any) -> TeacherIdentity:
    """Return the model to correct; raises ColdstillError if it cannot be trained or captured."""
    from ...stages.capture.plan import expect_capturable
    from ...stages.models.loading import (
        context_length,
        expect_loadable,
        load_config,
        teacher_identity,
    )
    from ...stages.models.vocabulary import vocabulary_size
    from ...stages.students.adapters import expect_peft

    recipe = work.recipe
    teacher, logits = recipe.teacher, recipe.logits
    assert teacher.model is not None
    if teacher.lora is not None:
        expect_peft("teacher.lora")
    name, where = work.local(teacher.model), "teacher.model"
    own_code, revision = teacher.trust_remote_code, teacher.revision
    expect_loadable(name, where, revision, own_code=own_code)
    work.doing("train-teacher", READ_TEACHER)
    base = teacher_identity(name, where, dtype="auto", revision=revision, own_code=own_code)
    longest = context_length(load_config(name, where, revision, own_code=own_code))
    capture = Capture(head=logits.head, tail=logits.tail)
    length = recipe.corpus.sequence_length
    expect_capturable(capture, vocabulary_size(tokenizer), length, longest)
    return base


def _expect_uncaptured(run: Run, base: TeacherIdentity) -> None:
    """Refuse to correct a teacher whose uncorrected logits are in the run's stores already."""
    for at in (run.heldout, run.logits):
        place = place_at(at)
        if place.exists(MANIFEST) and read_manifest(place).teacher.fingerprint == base.fingerprint:
            raise ColdstillError(
                f"{place}: has the logits of {base.name} before its correction; give this run "
                "another name, or remove 'train' from the recipe's teacher"
            )


def _load_base(work: Work) -> Any:
    from ...stages.models.device import best_device
    from ...stages.models.loading import load_model

    teacher = work.recipe.teacher
    assert teacher.model is not None
    work.doing("train-teacher", "load the teacher")
    return load_model(
        work.local(teacher.model),
        "teacher.model",
        precision="auto",  # it is saved in this precision; teacher.dtype is for the capture
        attention=teacher.attention,
        revision=teacher.revision,
        own_code=teacher.trust_remote_code,
    ).to(best_device())


def _heldout(work: Work) -> Heldout:
    """Return the held-out sequences on which all models of this run are measured."""
    from ...stages.capture.plan import chosen_rows
    from ...stages.evaluation.quality import Heldout

    recipe = work.recipe
    sequences = CorpusLayout(work.run.corpus).open("heldout")
    rows = chosen_rows(len(sequences), recipe.evaluation.sequences, recipe.seed)
    batch = sequences_in(recipe.logits.batch_tokens, recipe.corpus.sequence_length)
    return Heldout(sequences, rows, batch)


def tokenizer_of(work: Work) -> Any:
    """Return the teacher's tokenizer; a new teacher's tokenizer is trained if it is missing.

    Raises
        ColdstillError: it cannot be loaded, or it was trained with another vocabulary size
    """
    from ...stages.corpus.train_tokenizer import train_tokenizer
    from ...stages.models.loading import load_tokenizer

    recipe, run = work.recipe, work.run
    if (teacher := named_teacher(work)) is not None:
        return tokenizer_of_model(work, teacher)
    assert recipe.teacher.tokenizer is not None
    if not run.tokenizer.exists():
        if built_on := _built_on_corpus(run):
            raise ColdstillError(
                f"{run.root}: teacher.tokenizer asks for a new tokenizer, but {built_on} was made "
                "with another; give this run another name"
            )
        tokenizer = train_tokenizer(
            run.tokenizer, recipe.teacher.tokenizer, recipe.corpus, work.loaded.base, work.report
        )
        work.begin()
        return tokenizer
    tokenizer = load_tokenizer(str(run.tokenizer), "teacher.tokenizer")
    wanted = recipe.teacher.tokenizer.vocabulary
    if len(tokenizer) != wanted:
        raise ColdstillError(
            f"{run.tokenizer}: has {len(tokenizer)} tokens, the recipe now asks for {wanted}; give "
            "this run another name"
        )
    return tokenizer


def report_left_out(work: Work, tokenizer: Any, stage: str) -> None:
    """Report the tokens that were removed from the teacher's tokenizer, if any."""
    from ...stages.models.vocabulary import left_out_tokens

    if tokens := left_out_tokens(tokenizer):
        named = ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
        count = "1 token" if len(tokens) == 1 else f"{len(tokens)} tokens"
        work.note(stage, f"{count} of the tokenizer left out, without a row in the model: {named}")


def prepared(work: Work, tokenizer: Any, *, together: bool) -> CorpusRecord:
    """Return the prepared corpus; prepares it if it is missing or if its sources changed.

    together  whether documents share sequences

    Raises
        ColdstillError: the sources changed after a teacher or a store was made from them
    """
    from ...stages.prepare_corpus import (
        difference_in_corpus,
        outdated_labels,
        prepare_corpus,
        summary,
    )

    config, base, run = work.recipe.corpus, work.loaded.base, work.run
    prompts = work.recipe.teacher.generate is not None
    layout = CorpusLayout(run.corpus)
    record = layout.read_record()
    if record is not None:
        work.doing("corpus", "compare the sources with those that were read")
        changed = difference_in_corpus(
            record,
            config,
            base,
            tokenizer,
            prompts=prompts,
            written_ns=layout.record.stat().st_mtime_ns,
        )
        if changed is None and record.together in (together, False):
            work.note("corpus", summary(record))
            if outdated := outdated_labels(record, tokenizer):
                work.note("corpus", outdated, warning=True)
            return record
        built_on = _built_on_corpus(run)
        if changed is not None and built_on:
            raise ColdstillError(
                f"{run.corpus}: prepared differently: {changed}; {built_on} was made from it, so "
                "give this run another name"
            )
    record = prepare_corpus(
        run.corpus, config, base, tokenizer, together=together, prompts=prompts, report=work.report
    )
    work.begin()
    return record


def prepared_apart(work: Work, tokenizer: Any, family: str, stage: str) -> CorpusRecord:
    """Prepare the corpus again with one document per sequence, and report why."""
    work.note(
        stage,
        f"a {family!r} model cannot keep packed documents apart: one document per sequence from "
        "here on",
    )
    return prepared(work, tokenizer, together=False)


def _built_on_corpus(run: Run) -> str | None:
    """Return the first result that was made from the corpus, if any."""
    if run.teacher_settings.exists():
        return run.teacher_settings.name
    stores = {"logits": run.logits, "heldout": run.heldout}
    return next((n for n, at in stores.items() if place_at(at).exists(MANIFEST)), None)
