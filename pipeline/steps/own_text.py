"""Students with `rounds`: what is done, who acts next, and the jobs of their trainings.

The state of a student is what its folder has. After a training come its text, then the stores with
the teacher's scores. So each machine needs only the files that the next action reads.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...data.errors import ColdstillError
from ...data.files import json_sha256
from ...data.places.place import place_at
from ...data.prepared import CorpusLayout
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ...data.store.reader import is_complete, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ...data.store.reader import StoreReader
    from ...stages.students.job import StudentJob
    from ...stages.students.rounds.config import RoundsConfig
    from ..recipe.run_folder import StudentFolder
    from ..recipe.work import Work

Act = Literal["train", "write", "capture", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """The next action for one student."""

    student: str
    act: Act
    round: int
    """Number of the training that is made, or whose text is written or scored, from 1."""
    rounds: int
    """Number of all trainings."""
    machine: Literal["student", "teacher"]
    """The machine that acts."""
    command: str
    needs: tuple[str, ...]
    """Files of the other machine that the command reads, if the machines share no disk."""

    def in_words(self) -> str:
        """One line for a terminal."""
        before = self.round - (self.act == "train")
        done = {
            "train": f"the text of round {before} is scored" if before else "nothing is trained",
            "write": f"round {self.round} of {self.rounds} is trained",
            "capture": f"the text of round {self.round} is written",
            "evaluate": f"all {self.rounds} rounds are done",
        }[self.act]
        needs = f" (needs {', '.join(self.needs)})" if self.needs else ""
        return f"{self.student}: {done}; the {self.machine}'s machine acts: {self.command}{needs}"


def rounds_of(work: Work, name: str) -> RoundsConfig:
    """The rounds of a student; raises ColdstillError if it has none."""
    rounds = work.recipe.student(name).rounds
    if rounds is None:
        have = ", ".join(n for n, one in work.recipe.students.items() if one.rounds) or "none"
        raise ColdstillError(
            f"students.{name}: has no 'rounds', such as rounds = 2 (students with them: {have})"
        )
    return rounds


def students_with_rounds(work: Work, names: Sequence[str]) -> list[str]:
    """The named students, or all that have rounds; raises ColdstillError if there are none."""
    for name in names:
        rounds_of(work, name)
    found = list(names) or [name for name, one in work.recipe.students.items() if one.rounds]
    if not found:
        raise ColdstillError(
            f"{work.recipe.name}: no student of the recipe has 'rounds', such as rounds = 2"
        )
    return found


def next_act(work: Work, name: str) -> Next:
    """What is to be done next for a student with rounds."""
    count, folder = rounds_of(work, name).count, work.run.student(name)
    act, number = _state(folder, count)
    command = {"train": "train-student", "evaluate": "evaluate"}.get(act, f"rounds {act}")
    words = f"coldstill {command} {work.named} --student {shlex.quote(name)}"
    runs = str(work.run.root.parent)
    if work.run.root.name == work.recipe.name and runs != "runs":
        words += f" --runs {shlex.quote(runs)}"
    text = folder.text(number - 1 if act == "train" else number)
    needs: dict[str, list[Path]] = {
        "train": [text.root] if number > 1 else [],
        "capture": [text.text],
        "evaluate": [text.store("heldout")],
    }
    return Next(
        student=name,
        act=act,
        round=number,
        rounds=count,
        machine="teacher" if act == "capture" else "student",
        command=words,
        needs=tuple(map(str, needs.get(act, []))),
    )


def _state(folder: StudentFolder, count: int) -> tuple[Act, int]:
    for number in range(count, 0, -1):  # a machine may lack what earlier actions have made
        text = folder.text(number)
        if (record := CorpusLayout(text.text).read_record()) is not None:
            if not all(is_scored(text.store(split)) for split in record.splits):
                return "capture", number
            return ("evaluate", count) if number == count else ("train", number + 1)
        if folder.training(number, count).model.exists():
            return "write", number
    return "train", 1


def is_scored(folder: Path) -> bool:
    """Whether a store of a student's text is complete."""
    return is_complete(place_at(folder))


def training_settings(
    folder: StudentFolder, rounds: RoundsConfig, settings: dict[str, Any], number: int
) -> dict[str, Any]:
    """Everything that determines the weights after one training of a student with rounds."""
    stores = [folder.text(r).store("train") for r in range(1, number)] if rounds.share > 0 else []
    own = [
        json_sha256(read_manifest(place_at(store)).to_json())
        for store in stores
        if place_at(store).exists(MANIFEST)
    ]
    return {**settings, "training": number, "own": own}


def due_trainings(work: Work, job: StudentJob) -> Iterator[StudentJob]:
    """The trainings of a student that can be made now, each after the one before is made.

    job  its only training, or the first one of a student with rounds
    """
    if job.training is None:
        yield job
        return
    while (found := next_act(work, job.name)).act == "train":
        yield job if found.round == 1 else _later_job(work, job, found.round)
    work.note("rounds", found.in_words())


def _later_job(work: Work, job: StudentJob, number: int) -> StudentJob:
    """The job of a training after the first one. It starts from the model before it."""
    student, folder = work.recipe.student(job.name), work.run.student(job.name)
    rounds = rounds_of(work, job.name)
    assert job.settings is not None
    before = folder.training(number - 1, rounds.count)
    own: list[StoreReader] = []
    if rounds.share > 0:
        own = [open_store(folder.text(r).store("train")) for r in range(1, number)]
        expect_written_by(own[-1], before.model, f"students.{job.name}.rounds")
    of_first = job.settings.keys() - {"training", "own"}
    settings = {key: job.settings[key] for key in of_first}
    return dataclasses.replace(
        job,
        architecture=None,
        layers=None,
        prune=(),
        teacher=None,
        model=str(before.model),
        objective=rounds.learned_with(student.objective),
        config=rounds.training(student.train),
        seed=job.seed + number - 1,
        folder=folder.training(number, rounds.count).root,
        settings=training_settings(folder, rounds, settings, number),
        training=number,
        own=tuple(own),
        own_share=rounds.share,
    )


def expect_written_by(store: StoreReader, model: Path, where: str) -> None:
    """Refuse the scores of a text that another model wrote."""
    from ...stages.models.loading import teacher_identity

    written = store.manifest.written
    found = teacher_identity(str(model), where, dtype="auto", revision="main").fingerprint
    if written is None or written.fingerprint != found:
        author = "no student" if written is None else f"the model {written.fingerprint[:12]}"
        raise ColdstillError(
            f"{where}: the text of {store.place} was written by {author}, but {model} is "
            f"{found[:12]}; delete {store.place} and the text beside it, and write it again"
        )


def scored_texts(folder: StudentFolder) -> dict[int, tuple[Path, Path]]:
    """The rounds whose held-out text is scored and whose model is here: model and store by round.

    The model of the last round is the student itself; the others are in folders of their own.
    """
    numbers = sorted(int(p.name) for p in folder.written.glob("*") if p.name.isdecimal())
    found = {}
    for number in numbers:
        store = folder.text(number).store("heldout")
        model = folder.training(number, 0).model  # count 0: a folder of its own
        if number == numbers[-1] and not model.exists():
            model = folder.model
        if is_scored(store) and model.exists():
            found[number] = (model, store)
    return found
