"""What both stages stand on: the tokenizer, the prepared corpus, and a teacher made here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.layout import MANIFEST
from ..data.place import place_at
from ..data.prepared import CorpusLayout, CorpusRecord
from .work import beginning, is_done

if TYPE_CHECKING:
    from .run import Run
    from .work import Work


def train_teacher(work: Work) -> None:
    """Train the tokenizer and the teacher, where the recipe makes them here."""
    teacher = work.recipe.teacher
    if teacher.model is not None:
        work.say("train-teacher", f"nothing to train: the teacher is {teacher.model}")
    elif not train_missing_teacher(work):
        work.say("train-teacher", f"already trained: {work.run.teacher_model}")


def train_missing_teacher(work: Work) -> bool:
    """Whether there was anything to train."""
    recipe, run = work.recipe, work.run
    teacher = recipe.teacher
    assert teacher.architecture is not None
    assert teacher.train is not None
    tokenizer = tokenizer_of(work)
    record = prepared(work, tokenizer, together=recipe.corpus.pack)
    seed = recipe.seed if teacher.train.seed is None else teacher.train.seed
    settings = {
        "architecture": dataclasses.asdict(teacher.architecture),
        "train": dataclasses.asdict(teacher.train),
        "seed": seed,
        "corpus": record.splits["train"].packing,
    }
    if is_done(run.teacher_settings, run.teacher_model, settings, "teacher", "name = NEW"):
        return False
    from ..stages.train_teacher import train_teacher as train

    train(
        run.teacher,
        teacher.architecture,
        teacher.train,
        tokenizer,
        CorpusLayout(run.corpus).open("train"),
        sequence_length=recipe.corpus.sequence_length,
        together=record.together,
        seed=seed,
        report=work.report,
        begin=beginning(work, run.teacher_settings, settings),
    )
    return True


def tokenizer_of(work: Work) -> Any:
    from ..stages.models import load_tokenizer
    from ..stages.train_tokenizer import train_tokenizer

    recipe, run = work.recipe, work.run
    if recipe.teacher.model is not None:
        return load_tokenizer(
            work.local(recipe.teacher.model), "teacher.model", recipe.teacher.revision
        )
    assert recipe.teacher.tokenizer is not None
    if not run.tokenizer.exists():
        if built_on := _built_on_corpus(run):
            raise ColdstillError(
                f"{run.root}: teacher.tokenizer asks for a new tokenizer, but {built_on} rests on "
                "another; give this run another name"
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


def prepared(work: Work, tokenizer: Any, *, together: bool) -> CorpusRecord:
    """The corpus, prepared unless it already is; never replaced once something rests on it."""
    from ..stages.prepare_corpus import difference_in_corpus, prepare_corpus, summary

    config, base, run = work.recipe.corpus, work.loaded.base, work.run
    record = CorpusLayout(run.corpus).read_record()
    if record is not None:
        changed = difference_in_corpus(record, config, base, tokenizer)
        if changed is None and record.together in (together, False):
            work.say("corpus", summary(record))
            return record
        built_on = _built_on_corpus(run)
        if changed is not None and built_on:
            raise ColdstillError(
                f"{run.corpus}: prepared differently: {changed}; {built_on} rests on it, so give "
                "this run another name"
            )
    record = prepare_corpus(
        run.corpus, config, base, tokenizer, together=together, report=work.report
    )
    work.begin()
    return record


def _built_on_corpus(run: Run) -> str | None:
    """The first thing that would no longer fit if the corpus were another."""
    if run.teacher_settings.exists():
        return run.teacher_settings.name
    stores = {"logits": run.logits, "heldout": run.heldout}
    return next((n for n, at in stores.items() if place_at(at).exists(MANIFEST)), None)
