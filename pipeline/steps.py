"""The steps of a run: each makes what is missing and says so when nothing is.

A finished thing is never made again and never overwritten. What is there but was made with other
settings is refused, naming the setting.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json, write_json
from ..data.fingerprint import json_sha256
from ..data.layout import StoreLayout
from ..data.prepared import SPLITS, CorpusLayout, CorpusRecord
from ..data.reader import open_store
from ..data.schema import Capture
from ..stages.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data.reader import StoreReader
    from ..stages.report import Reporter
    from ..stages.teacher_logits import CapturePlan, Teacher
    from .recipe import LoadedRecipe, Recipe
    from .run import Run


@dataclass(frozen=True, slots=True)
class Work:
    """A recipe being carried out in a run."""

    loaded: LoadedRecipe
    run: Run
    report: Reporter

    @property
    def recipe(self) -> Recipe:
        """What is asked for."""
        return self.loaded.recipe

    def say(self, stage: str, note: str) -> None:
        """Tell the user a sentence."""
        self.report(Report(stage=stage, note=note))

    def local(self, model: str) -> str:
        """A model's folder relative to the recipe, or its hub name as it is."""
        folder = self.loaded.base / Path(model).expanduser()
        return str(folder) if folder.is_dir() else model


def train_teacher(work: Work) -> None:
    """Train the tokenizer and the teacher, where the recipe makes them here."""
    teacher = work.recipe.teacher
    if teacher.model is not None:
        work.say("train-teacher", f"nothing to train: the teacher is {teacher.model}")
        return
    _train_missing_teacher(work)


def teacher_logits(work: Work) -> None:
    """Run the teacher over both splits; first train it if it is made here and is not yet."""
    recipe, run = work.recipe, work.run
    if recipe.teacher.model is None:
        _train_missing_teacher(work)
    tokenizer = _tokenizer(work)
    record = _prepared(work, tokenizer, together=recipe.corpus.pack)
    plans = _capture_plans(work, tokenizer, record)
    from ..stages.teacher_logits import capture_split, is_captured

    if all(is_captured(plan) for plan in plans):
        work.say("teacher-logits", f"complete: {run.logits} and {run.heldout}")
        return
    teacher = _load_teacher(work, tokenizer)
    if record.together and teacher.isolation == "single":
        work.say(
            "teacher-logits",
            f"a {plans[0].teacher.family!r} model cannot keep packed documents apart: one document "
            "per sequence from here on",
        )
        record = _prepared(work, tokenizer, together=False)
        plans = _capture_plans(work, tokenizer, record)
    if not record.together:
        teacher = dataclasses.replace(teacher, isolation="single")
    # the small one first: what is wrong with a teacher shows there, at little cost
    for plan in reversed(plans):
        if is_captured(plan):
            work.say(f"teacher-logits {plan.split}", f"complete: {plan.folder}")
        else:
            capture_split(plan, teacher, work.report)


def train_students(work: Work, names: Sequence[str]) -> None:
    """Train the named students, or all of the recipe's."""
    from ..stages.train_student import StudentJob, train_student

    chosen = list(names) or list(work.recipe.students)
    if not chosen:
        raise ColdstillError(f"{work.recipe.name}: the recipe has no students")
    students = {name: work.recipe.student(name) for name in chosen}
    store = _open(work.run.logits, work)
    for name, student in students.items():
        folder = work.run.student(name)
        seed = work.recipe.seed if student.train.seed is None else student.train.seed
        table = student.model_dump(mode="json", exclude={"like"})
        settings = {"student": table, "seed": seed, "store": _store_fingerprint(store)}
        if _is_done(folder.settings, folder.model, settings, f"students.{name}", "--student NEW"):
            work.say(f"train-student {name}", f"already trained: {folder.model}")
            continue
        write_json(folder.settings, settings)
        job = StudentJob(
            name=name,
            architecture=student.architecture,
            model=None if student.model is None else work.local(student.model),
            objective=student.objective,
            config=student.train,
            seed=seed,
            folder=folder.root,
        )
        train_student(job, store, work.report)


def evaluate(work: Work, names: Sequence[str]) -> None:
    """Measure the named students, or all that are trained, on the held-out store."""
    from ..stages.evaluate import evaluate_student

    store = _open(work.run.heldout, work)
    trained = [n for n in work.run.student_names if work.run.student(n).model.exists()]
    for name in names:
        if name not in trained:
            raise ColdstillError(
                f"{work.run.root}: student '{name}' is not trained (trained: "
                f"{', '.join(trained) or 'none'}); run coldstill train-student --student {name}"
            )
    if not trained:
        raise ColdstillError(
            f"{work.run.root}: no student is trained yet; run coldstill train-student"
        )
    for name in list(names) or trained:
        folder = work.run.student(name)
        if folder.evaluation.exists():
            work.say(f"evaluate {name}", f"already done: {folder.evaluation}")
            continue
        result = evaluate_student(name, folder.model, store, work.report)
        write_json(folder.evaluation, dataclasses.asdict(result))
        work.say(f"evaluate {name}", f"held-out loss {result.loss:.4f}, KL {result.kl:.4f}")


def _train_missing_teacher(work: Work) -> None:
    recipe, run = work.recipe, work.run
    teacher = recipe.teacher
    assert teacher.architecture is not None
    assert teacher.train is not None
    tokenizer = _tokenizer(work)
    record = _prepared(work, tokenizer, together=recipe.corpus.pack)
    seed = recipe.seed if teacher.train.seed is None else teacher.train.seed
    settings = {
        "architecture": dataclasses.asdict(teacher.architecture),
        "train": dataclasses.asdict(teacher.train),
        "seed": seed,
        "corpus": record.splits["train"].packing,
    }
    if _is_done(run.teacher_settings, run.teacher_model, settings, "teacher", "name = NEW"):
        work.say("train-teacher", f"already trained: {run.teacher_model}")
        return
    write_json(run.teacher_settings, settings)
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
    )


def _tokenizer(work: Work) -> Any:
    from ..stages.models import load_tokenizer
    from ..stages.train_tokenizer import train_tokenizer

    recipe, run = work.recipe, work.run
    if recipe.teacher.model is not None:
        return load_tokenizer(work.local(recipe.teacher.model), "teacher.model")
    assert recipe.teacher.tokenizer is not None
    if not run.tokenizer.exists():
        return train_tokenizer(
            run.tokenizer, recipe.teacher.tokenizer, recipe.corpus, work.loaded.base, work.report
        )
    tokenizer = load_tokenizer(str(run.tokenizer), "teacher.tokenizer")
    wanted = recipe.teacher.tokenizer.vocabulary
    if len(tokenizer) != wanted:
        raise ColdstillError(
            f"{run.tokenizer}: has {len(tokenizer)} tokens, the recipe now asks for {wanted}; give "
            "this run another name"
        )
    return tokenizer


def _prepared(work: Work, tokenizer: Any, *, together: bool) -> CorpusRecord:
    """The corpus, prepared unless it already is; never replaced once something rests on it."""
    from ..stages.prepare_corpus import difference_in_corpus, prepare_corpus, summary

    config, base, run = work.recipe.corpus, work.loaded.base, work.run
    record = CorpusLayout(run.corpus).read_record()
    if record is not None:
        changed = difference_in_corpus(record, config, base, tokenizer)
        if changed is None and record.together in (together, False):
            work.say("corpus", summary(record))
            return record
        built_on = [p for p in (run.teacher_settings, run.logits, run.heldout) if p.exists()]
        if changed is not None and built_on:
            raise ColdstillError(
                f"{run.corpus}: prepared differently: {changed}; {built_on[0].name} rests on it, so "
                "give this run another name"
            )
    return prepare_corpus(
        run.corpus, config, base, tokenizer, together=together, report=work.report
    )


def _capture_plans(work: Work, tokenizer: Any, record: CorpusRecord) -> list[CapturePlan]:
    from ..stages.models import teacher_identity, vocabulary_size
    from ..stages.teacher_logits import CapturePlan, chosen_rows

    recipe, run = work.recipe, work.run
    logits, table = recipe.logits, recipe.teacher
    name = _teacher_name(work)
    identity = teacher_identity(name, "teacher.model", dtype=table.dtype, revision=table.revision)
    size = vocabulary_size(tokenizer)
    heldout_head = min(recipe.evaluation.head, size)
    captures = {
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
    wanted = {"train": logits.sequences, "heldout": recipe.evaluation.sequences}
    folders = {"train": run.logits, "heldout": run.heldout}
    plans = []
    for split in SPLITS:
        sequences = CorpusLayout(run.corpus).open(split)
        plans.append(
            CapturePlan(
                split=split,
                teacher=identity,
                context=_context(name, table.revision),
                tokenizer=tokenizer,
                corpus=record,
                sequences=sequences,
                rows=chosen_rows(len(sequences), wanted[split], recipe.seed),
                capture=captures[split],
                sequence_length=recipe.corpus.sequence_length,
                shard_tokens=logits.shard_tokens,
                batch_tokens=logits.batch_tokens,
                codec=logits.codec,
                store=logits.store,
                folder=folders[split],
            )
        )
    return plans


def _context(name: str, revision: str) -> int | None:
    from transformers import AutoConfig

    from ..stages.models import context_length

    return context_length(AutoConfig.from_pretrained(name, revision=revision))


def _load_teacher(work: Work, tokenizer: Any) -> Teacher:
    from ..stages.device import best_device
    from ..stages.isolation import choose_isolation
    from ..stages.models import load_model, vocabulary_size
    from ..stages.output_head import connect_head
    from ..stages.teacher_logits import Teacher

    table = work.recipe.teacher
    model = load_model(
        _teacher_name(work),
        "teacher.model",
        precision=table.dtype,
        attention=table.attention,
        revision=table.revision,
    ).to(best_device())
    size = vocabulary_size(tokenizer)
    length = work.recipe.corpus.sequence_length
    return Teacher(
        head=connect_head(model, size, work.report),
        isolation=choose_isolation(model, size, length),
    )


def _teacher_name(work: Work) -> str:
    model = work.recipe.teacher.model
    return str(work.run.teacher_model) if model is None else work.local(model)


def _open(folder: Path, work: Work) -> StoreReader:
    if not StoreLayout(folder).manifest.exists():
        raise ColdstillError(
            f"{folder}: no store there; make it first with coldstill teacher-logits "
            f"{work.recipe.name}"
        )
    return open_store(folder)


def _is_done(record: Path, product: Path, settings: Any, where: str, remedy: str) -> bool:
    """Whether `product` is there, made with these settings.

    Raises
        ColdstillError: it was made, or begun, with others (the first that differs)
    """
    settings = json.loads(json.dumps(settings))
    if record.exists():
        changed = first_difference(read_json(record), settings)
        if changed is not None:
            raise ColdstillError(
                f"{record.parent}: {where} was trained with {changed}; keep it and train another "
                f"under a new name ({remedy})"
            )
        return product.exists()
    return False


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first leaf in which two JSON values differ, as `key = old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            if found := first_difference(old.get(name), new.get(name), inner):
                return found
        return None
    return None if old == new else f"{key} = {old!r}, now {new!r}"


def _store_fingerprint(store: StoreReader) -> str:
    return json_sha256(store.manifest.to_json())
