"""The plan of a recipe: state, size, memory and time of every step. Loads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...data.corpus.sources import list_sources
from ...data.schema import Capture
from ...stages.planning.model_sizes import unused_size
from ...stages.students.pruning.shapes import shortfall
from .checks import (
    expect_holding_formats,
    expect_loadable_models,
    expect_packable_students,
    expect_trainable,
    left_out_tokens,
)
from .costs import (
    capture_hours,
    capture_speeds,
    forward_speed,
    pruning_hours,
    rounded_steps,
    stage_memory,
    training_hours,
)
from .models import student_family, student_sizes, teacher_sizes
from .own_text import plan_rounds
from .own_tokens import plan_own_tokens
from .pilot_record import read_pilot
from .sizes import captures, corpus_sizes, expected_bytes, free_bytes, store_sizes
from .teachable import expect_teachable_students

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...data.prepared import Split
    from ...stages.planning.model_sizes import ModelSizes
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work
    from .own_text import RoundsPlan
    from .own_tokens import TokensPlan
    from .pilot_record import PilotRecord
    from .sizes import StoreSize

_OTHERS = ((0, 24), (16, 16), (50, 0), (4, 20))
"""(head, tail) of the alternatives: only an unbiased sample, both, plain top-k, and both at about
half the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSize:
    """Size of the training store with one capture and codec."""

    head: int
    tail: int
    codec: str
    bytes_per_position: float
    measured: str | None
    """`store` or `pilot`; None if estimated by a rule."""
    bytes: int
    """Bytes of the whole store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPlan:
    """What is known of a student before it is trained."""

    steps: int
    """Steps of all its trainings."""
    tokens: int
    """Tokens of all steps."""
    parameters: int | None
    """None if its model is not on this machine."""
    done: bool
    note: str | None
    """A remark on its sizes."""
    not_exported_to: list[str]
    """Export formats that do not support its family."""
    slowdown: float | None
    """Time of a step that rounds, relative to one that does not; None without `quantize`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a recipe. Stages are named by command and student, such as `train-student S`."""

    run: str
    sources: int
    source_bytes: int
    counted: bool
    """Whether the corpus is prepared, so that its numbers are counted."""
    sequences: dict[Split, int]
    positions: dict[Split, int]
    supervised_share: dict[Split, float]
    """Supervised positions per token."""
    basis: str
    """What the estimate of the corpus is based on; empty if counted."""
    stores: dict[Split, StoreSize]
    capture: dict[str, int]
    """Head and tail of the training store."""
    codec: str
    alternatives: list[CaptureSize]
    teacher: str
    left_out_tokens: list[str]
    """Tokens of the tokenizer for which the model has no row."""
    teacher_done: bool
    students: dict[str, StudentPlan]
    tokens: list[TokensPlan]
    """Stores in the tokens of students that have others than the teacher."""
    rounds: dict[str, RoundsPlan]
    """The rounds of each student that has some."""
    memory: dict[str, int | None]
    """Bytes of each stage; None if its model is not on this machine."""
    tokens_per_second: float | None
    """Measured speed of the teacher."""
    hours: dict[str, float | None]
    """Remaining time of each stage; None without a measured speed."""
    cache_bytes: int
    """Size limit of the local cache of a remote store."""
    free_bytes: int
    """Free bytes of the disk of the run."""

    def as_json(self) -> dict[str, Any]:
        facts = asdict(self)
        for own, planned in zip(facts["tokens"], self.tokens, strict=True):
            own["folder"] = str(planned.stores["train"].folder)
            for store in own["stores"].values():
                del store["folder"]
        for split, store in self.stores.items():
            found = facts["stores"][split]
            del found["folder"]
            found["shards_missing"] = store.shards - store.shards_done
            found["free_bytes"] = None if store.folder is None else free_bytes(store.folder)
        return facts


def make_plan(work: Work) -> Plan:
    """Plan a recipe.

    Raises
        ColdstillError: sources do not exist, a record is damaged, a model lacks rows for needed
            tokens, the trainer does not accept a setting, a model cannot be loaded, or a student
            cannot learn from the store
    """
    recipe, run = work.recipe, work.run
    expect_trainable(recipe, recipe.students, teacher=True)
    expect_packable_students(work)
    expect_holding_formats(work)
    expect_teachable_students(work)
    left_out = left_out_tokens(work)
    corpus = corpus_sizes(work)
    pilot = read_pilot(work)
    stores = store_sizes(work, corpus, pilot)
    captured = all(store.shards_done == store.shards for store in stores.values())
    expect_loadable_models(work, captured=captured)
    teacher = teacher_sizes(work)
    students = student_sizes(work, teacher)
    sources = list_sources(recipe.corpus.files, work.loaded.base)
    speeds = capture_speeds(run, pilot)
    hours = _training_hours(work)
    speed = forward_speed(run, pilot if recipe.teacher.generate is None else None)
    hours |= _pruning_hours(work, teacher, students, stores["train"], speed)
    hours["teacher-logits"] = capture_hours(stores, speeds, recipe.corpus.sequence_length)
    rounds = {
        name: plan_rounds(work, name, stores, speeds)
        for name, student in recipe.students.items()
        if student.rounds is not None
    }
    for name, one in rounds.items():
        hours[f"train-student {name}"] = one.train_hours
        hours[f"rounds write {name}"] = one.write_hours
        hours[f"rounds capture {name}"] = one.capture_hours
    memory = stage_memory(recipe, teacher, students)
    return Plan(
        run=str(run.root),
        sources=len(sources),
        source_bytes=sum(source.bytes for source in sources),
        counted=all(split.counted for split in corpus.values()),
        sequences={split: size.sequences for split, size in corpus.items()},
        positions={split: size.positions for split, size in corpus.items()},
        supervised_share={
            split: round(size.positions / max(1, size.tokens), 4) for split, size in corpus.items()
        },
        basis=corpus["train"].basis,
        stores=stores,
        capture={"head": recipe.logits.head, "tail": recipe.logits.tail},
        codec=recipe.logits.codec_name,
        alternatives=_alternatives(work, pilot, stores["train"].positions),
        teacher=recipe.teacher.model or "trained here",
        left_out_tokens=left_out,
        teacher_done=not recipe.teacher.is_trained_here or run.teacher_model.exists(),
        students={
            name: _student(work, name, student, students[name], teacher)
            for name, student in recipe.students.items()
        },
        tokens=plan_own_tokens(work, stores),
        rounds=rounds,
        memory=memory,
        tokens_per_second=speeds["train"],
        hours={stage: hours.get(stage) for stage in memory},
        cache_bytes=recipe.logits.cache,
        free_bytes=free_bytes(run.root),
    )


def _student(
    work: Work,
    name: str,
    student: StudentTable,
    sizes: Sequence[ModelSizes],
    teacher: ModelSizes | None,
) -> StudentPlan:
    from ...stages.export import FORMATS, unable

    parameters = sizes[-1].parameters if sizes else None
    note = None
    if student.architecture is not None:
        note = unused_size(student.architecture, f"students.{name}.architecture")
    elif student.prune is not None and parameters is not None and teacher is not None:
        where = f"students.{name}.prune"
        note = shortfall(student.prune[-1], parameters, teacher.parameters, where)
    steps = student.train.steps * max(1, len(student.prune or ()))
    if student.rounds is not None:
        steps += student.rounds.training(student.train).steps * (student.rounds.count - 1)
    family = student_family(work, student)
    rounded = rounded_steps(student.train, work.recipe.corpus.sequence_length, student.quantize)
    return StudentPlan(
        steps=steps,
        tokens=steps * student.train.batch_tokens,
        parameters=parameters,
        done=work.run.student(name).model.exists(),
        note=note,
        not_exported_to=[] if family is None else unable(family, tuple(FORMATS)),
        slowdown=None if student.quantize is None else round(rounded.slowdown, 3),
    )


def _alternatives(work: Work, pilot: PilotRecord | None, positions: int) -> list[CaptureSize]:
    """Up to four other ways of capturing these positions: other heads and tails, another codec."""
    logits = work.recipe.logits
    own = captures(work.recipe)["train"]
    samples = work.recipe.teacher.url is None  # which a server does not give
    ways = [(head, tail, "compact") for head, tail in _OTHERS if samples or not tail]
    other = "compact" if logits.codec_name == "plain" else "plain"
    ways.insert(len(ways) - 1, (own.head, own.tail, other))
    current = (own.head, own.tail, logits.codec_name)
    found = []
    for head, tail, codec in [way for way in dict.fromkeys(ways) if way != current][:4]:
        capture = Capture(head=head, tail=tail, temperatures=own.temperatures)
        row = None if pilot is None else pilot.row(head, tail, codec)
        width = expected_bytes(capture, codec) if row is None else row.bytes_per_position
        found.append(
            CaptureSize(
                head=head,
                tail=tail,
                codec=codec,
                bytes_per_position=round(width, 1),
                measured=None if row is None else "pilot",
                bytes=round(positions * width),
            )
        )
    return found


def _pruning_hours(
    work: Work,
    teacher: ModelSizes | None,
    students: Mapping[str, Sequence[ModelSizes]],
    store: StoreSize,
    speed: float | None,
) -> dict[str, float | None]:
    """Hours of the cut of each student; None for several, which have models and speeds of their
    own."""
    hours: dict[str, float | None] = {}
    samples: set[tuple[int, int | None]] = set()
    """Those on which importance is measured; a second cut from one of them uses its scores."""
    for name, student in work.recipe.students.items():
        sizes, folder = students[name], work.run.student(name)
        if not student.prune or teacher is None or not sizes:
            continue
        cut, several = student.prune[0], len(student.prune) > 1
        tokens = min(cut.sequences, store.sequences) * work.recipe.corpus.sequence_length
        if folder.model.exists() or (not several and folder.is_begun(1)):
            left: float | None = 0.0
        else:
            sample = (cut.sequences, student.train.seed)
            known = sample in samples
            samples.add(sample)
            left = pruning_hours(cut, teacher, sizes[0], tokens, speed, known=known)
            left = None if several else left
        hours[f"prune-student {name}"] = left
    return hours


def _training_hours(work: Work) -> dict[str, float | None]:
    recipe, run = work.recipe, work.run
    length = recipe.corpus.sequence_length
    hours: dict[str, float | None] = {}
    if recipe.teacher.train is not None:
        hours["train-teacher"] = (
            0.0
            if run.teacher_model.exists()
            else training_hours(recipe.teacher.train, run.teacher, length)
        )
    for name, student in recipe.students.items():
        folder, stage = run.student(name), f"train-student {name}"
        if folder.model.exists():
            hours[stage] = 0.0
        elif len(student.prune or ()) < 2:
            # otherwise each round has a model and a speed of its own
            hours[stage] = training_hours(student.train, folder.root, length, student.quantize)
    return hours
