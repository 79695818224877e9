"""Students that could not learn from the teacher's store, found before the teacher works."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...data.corpus.formats import read_documents
from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.places.place import place_at
from ...data.retokenized.records import mapped_capture
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...stages.config import RetokenizeConfig
from ...stages.models.model_files import UNPACKED, without_branches
from ..recipe.own_tokens import own_tokens
from .models import folder_of, student_family
from .own_tokens import teacher_tokens
from .sizes import captures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...data.schema import Capture
    from ...data.store.manifest import TokenizerIdentity
    from ...stages.objective_config import ObjectiveConfig
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work

_ALWAYS = {"kl", "cross_entropy", "chunk_likelihood"}
"""Losses that every capture of a teacher supports at temperature 1."""

_DOCUMENTS = 100
"""Documents that are searched for a chat."""


def expect_teachable_students(work: Work) -> None:
    """Refuse students that the store will not teach, as far as the recipe shows it.

    Raises
        ColdstillError: a loss or a temperature that the store will not support, weights that are
            always 0, what a student with other tokens than the teacher cannot have, tokens that
            cannot be aligned, or `branches` for a family that cannot read them
    """
    teacher = None
    for name, student in work.recipe.students.items():
        if work.run.student(name).model.exists() or not student.shares[0]:
            continue
        if student.model is not None and teacher is None:
            teacher = teacher_tokens(work)
        kept = _captures(work, name, student, teacher)
        family = student_family(work, student)
        for objective, steps, where in _trainings(name, student):
            if family in UNPACKED and "branches" in objective.weights:
                raise without_branches(family, where)
            _expect_supported(objective, steps, kept, where)


def _captures(
    work: Work, name: str, student: StudentTable, teacher: tuple[TokenizerIdentity, Any] | None
) -> list[Capture]:
    """What the store of a student holds; both possibilities if it is not known on this machine
    whether the student has the teacher's tokens."""
    place = place_at(work.run.logits)
    made = place.exists(MANIFEST)
    kept = read_manifest(place).capture if made else captures(work.recipe)["train"]
    if student.model is None:
        return [kept]
    if teacher is None or not _is_here(work, name, student):
        # the sizes of the vocabularies do not matter
        table = student.retokenize or RetokenizeConfig()
        drawn = table.branches > 0
        mapped = replace(kept, temperatures=(), tail_logprobs=False, chunks=True, branches=drawn)
        return [kept, mapped]
    from ...stages.models.vocabulary import vocabulary_size
    from ...stages.student_tokens import expect_alignable

    identity, tokenizer = teacher
    if (found := own_tokens(work, name, student, identity.fingerprint)) is None:
        return [kept]
    own, loaded = found
    if tokenizer is not None:  # nothing is captured yet
        decisions = own.made("logits", kept.tail) if _has_chats(work) else None
        expect_alignable(tokenizer, loaded, f"students.{name}", decisions)
    size, drawn = vocabulary_size(loaded), own.made("logits", kept.tail).branches > 0
    return [mapped_capture(kept, identity.size, size, branches=drawn)]


def _is_here(work: Work, name: str, student: StudentTable) -> bool:
    """Whether the tokenizer of a student's model can be loaded here; training reports if not."""
    from ...stages.student_tokens import tokenizer_of

    assert student.model is not None
    if folder_of(work, student.model) is None:
        return False
    where, own_code = f"students.{name}.model", student.trust_remote_code
    try:
        tokenizer_of(work.local(student.model), where, own_code=own_code)
    except ColdstillError:
        return False
    return True


def _has_chats(work: Work) -> bool:
    """Whether the teacher's chat template writes one of the first documents."""
    corpus = work.recipe.corpus
    prompts = work.recipe.teacher.generate is not None
    columns = corpus.columns.for_prompts() if prompts else corpus.columns
    try:
        sources = [s for s in list_sources(corpus.files, work.loaded.base) if s.format != "hub"]
        documents = list(islice(read_documents(sources, columns, lambda bad: None), _DOCUMENTS))
    except ColdstillError:
        return False  # preparing the corpus reports it
    return any(one.messages or (corpus.as_chat and one.prompt) for one in documents)


def _trainings(name: str, student: StudentTable) -> Iterator[tuple[ObjectiveConfig, int, str]]:
    """The objective and the steps of each training of a student, and their place in the recipe."""
    where, rounds = f"students.{name}", student.rounds
    yield student.objective, student.train.steps, f"{where}.objective"
    if rounds is not None:
        table = "rounds.objective" if rounds.objective else "objective"
        steps = rounds.training(student.train).steps
        yield rounds.learned_with(student.objective), steps, f"{where}.{table}"


def _expect_supported(
    objective: ObjectiveConfig, steps: int, kept: Sequence[Capture], where: str
) -> None:
    weights = objective.weights
    changing = any(weight.schedule != "constant" for weight in weights.values())
    usual = weights.keys() <= _ALWAYS and objective.temperature == 1.0
    imported = any(capture.guessed_labels or not capture.mass for capture in kept)
    if weights and usual and not changing and not imported and not objective.labels_inside:
        return  # nothing to check, so torch is not loaded
    from ...stages.training.objective import expect_weight, terms_of

    faults = []
    for capture in kept:
        try:
            expect_weight(terms_of(objective, capture, where), steps, where)
        except ColdstillError as error:
            faults.append(error)
    if len(faults) == len(kept):
        raise faults[0]
