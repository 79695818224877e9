"""Rounds of a student: it writes text, and the teacher scores it.

Training is the step `train-student`. Writing needs no teacher, and scoring needs no student, so no
machine needs both.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.prepared import CorpusLayout
from ...stages.ranks import world_size
from .capture import checked_teacher, loaded_teacher, plan_of
from .own_text import next_act, students_with_rounds
from .students import claimed_student, job_as_trained, open_made, train_students
from .teacher import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...data.prepared import CorpusRecord
    from ...stages.capture.plan import CapturePlan
    from ...stages.interruption import Interruption
    from ...stages.models.inputs import Isolation
    from ...stages.students.rounds.writing import Manuscript
    from ..recipe.run_folder import TextFolder
    from ..recipe.work import Work
    from .capture import CheckedTeacher
    from .own_text import Next


def next_acts(work: Work, names: Sequence[str]) -> list[Next]:
    """The next action for the named students, or for all students with rounds.

    Raises
        ColdstillError: a student without rounds, or a damaged record
    """
    return [next_act(work, name) for name in students_with_rounds(work, names)]


def write_texts(work: Work, names: Sequence[str]) -> None:
    """Let the named students, or all with rounds, write the text that is due. Needs no teacher.

    Raises
        ColdstillError: a store is missing, no document gives a prompt, several processes, or
            another process works on the student
        StoppedError: SIGTERM arrived; the answers of complete batches are kept
    """
    from ...stages.interruption import Interruption

    if world_size() > 1:
        raise ColdstillError(
            f"rounds write: one process writes a text, this is one of {world_size()}; start it "
            "without torchrun"
        )
    interruption = Interruption()
    with interruption.listening():
        for name in students_with_rounds(work, names):
            with claimed_student(work.run.student(name)):
                if (found := next_act(work, name)).act == "write":
                    with interruption.postponed():
                        _write(work, name, found.round, interruption)
                    found = next_act(work, name)
            work.note("rounds", found.in_words())


def _write(work: Work, name: str, number: int, interruption: Interruption) -> None:
    from ...stages.students.rounds.writing import WritingJob, write_text

    student, folder = work.recipe.student(name), work.run.student(name)
    assert student.rounds is not None
    stores = {"train": work.run.logits, "heldout": work.run.heldout}
    trained = job_as_trained(work, name, open_made(work.run.logits, work))
    job = WritingJob(
        name=name,
        model=folder.training(number, student.rounds.count).model,
        round=number,
        config=student.rounds,
        sources={split: open_made(stores[split], work) for split in student.rounds.written(number)},
        seed=trained.seed,
        folder=folder.text(number).text,
        speed=folder.text(number).speed,
        own_code=work.recipe.trusts(name),
        begin=partial(work.begin, student=True),
    )
    write_text(job, work.report, lambda: interruption.asked)


def capture_texts(work: Work, names: Sequence[str]) -> None:
    """Let the teacher score the texts of the named students, or of all with rounds.

    Needs no student: only the folder of the text. Several processes can share the work.

    Raises
        ColdstillError: another teacher, tokenizer or capture than that of the first store
        StoppedError: SIGTERM arrived; finished shards are kept
    """
    from ...stages.interruption import Interruption

    interruption = Interruption()
    with interruption.listening():
        chosen = students_with_rounds(work, names)
        due = [found for found in next_acts(work, chosen) if found.act == "capture"]
        if due:
            _capture(work, due, interruption)
        for name in chosen:
            work.note("rounds", next_act(work, name).in_words())


def _capture(work: Work, due: Sequence[Next], interruption: Interruption) -> None:
    from ...stages.students.rounds.writing import forget_answers, manuscript_of
    from ...stages.teacher_logits import capture_split, is_captured

    if work.recipe.teacher.tensor_parallel:
        from ...stages.capture.teacher import expect_several_processes

        expect_several_processes()
    tokenizer = tokenizer_of(work)
    checked = checked_teacher(work, tokenizer)
    plans: list[CapturePlan] = []
    for found in due:
        text = work.run.student(found.student).text(found.round)
        layout = CorpusLayout(text.text)
        record = layout.read_record()
        assert record is not None  # it is captured next
        forget_answers(text.text)  # of a writing that was killed at its very end
        manuscript = manuscript_of(record, layout.record)
        _expect_first_teacher(checked, manuscript, found.student)
        plans += _plans(work, tokenizer, checked, text, record, manuscript)
    missing = [plan for plan in plans if not is_captured(plan)]
    if not missing:
        return
    together = any(plan.corpus.together for plan in missing)
    name = f"teacher {checked.identity.name}"
    teacher = loaded_teacher(work, tokenizer, name, "rounds", together=together)
    with contextlib.closing(teacher):
        _expect_packs(missing, teacher.isolation)
        begin = partial(work.begin, student=True)
        for plan in missing:
            with interruption.postponed():
                capture_split(plan, teacher, work.report, begin, stop=lambda: interruption.asked)


def _plans(
    work: Work,
    tokenizer: Any,
    checked: CheckedTeacher,
    text: TextFolder,
    record: CorpusRecord,
    manuscript: Manuscript,
) -> list[CapturePlan]:
    """The captures of one text, each like that of the first store; the small one first."""
    from ...stages.capture.plan import chosen_rows

    plans = []
    for split in sorted(record.splits):
        sequences = CorpusLayout(text.text).open(split)
        plans.append(
            plan_of(
                work,
                tokenizer,
                checked,
                record,
                split=split,
                sequences=sequences,
                rows=chosen_rows(len(sequences), None, 0),
                capture=manuscript.captures[split],
                sequence_length=manuscript.sequence_length,
                folder=text.store(split),
                written=manuscript.written,
            )
        )
    return plans


def _expect_first_teacher(checked: CheckedTeacher, manuscript: Manuscript, name: str) -> None:
    found = checked.identity
    if found.fingerprint != manuscript.teacher:
        raise ColdstillError(
            f"students.{name}.rounds: {found.name} is not the teacher of the first store: its "
            f"fingerprint is {found.fingerprint[:12]}, the first one's {manuscript.teacher[:12]}; "
            "set teacher.model to the first teacher"
        )


def _expect_packs(plans: Sequence[CapturePlan], isolation: Isolation) -> None:
    from ...stages.models.isolation import packs

    for plan in plans:
        if plan.corpus.together and not packs(isolation):
            raise ColdstillError(
                f"{plan.folder}: the text is packed as the first store is, but the teacher cannot "
                "keep packed documents apart now; load it as it was loaded for the first store"
            )


def finish_rounds(work: Work) -> None:
    """Do everything that is due for all students with rounds, on one machine.

    Raises
        ColdstillError: as the steps; StoppedError likewise
    """
    names = [name for name, student in work.recipe.students.items() if student.rounds]
    steps: dict[str, Callable[[Work, list[str]], object]]
    steps = {"train": train_students, "write": write_texts, "capture": capture_texts}
    while acts := [found for found in map(partial(next_act, work), names) if found.act in steps]:
        first = acts[0].act
        steps[first](work, [found.student for found in acts if found.act == first])
        if [found for found in map(partial(next_act, work), names) if found.act in steps] == acts:
            raise ColdstillError(
                f"{work.run.root}: other processes work on {', '.join(names)}; wait for them, then "
                "run the same command again"
            )
