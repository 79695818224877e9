"""The folder of a run, and the records in it: no other file builds a path inside it.

The records are the recipe as written, the validated recipe, and the environment. A run can have
students that its recipe file does not name: variants and points of a sweep. The validated recipe
has all of them with their own settings, so that the run's folder, used as a recipe, makes each of
them again.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.errors import ColdstillError
from ...data.files import read_json, whole_file, write_json
from ...data.places.cache import CacheSettings
from ...data.places.claims import claimed
from .reading import RESOLVED, VERBATIM, load_recipe
from .tables import NAME_PATTERN, TEACHER, StudentTable

if TYPE_CHECKING:
    from ...data.prepared import Split
    from .reading import LoadedRecipe


_ROOMS = ("pipeline", "stages", "data", "tests")


class _Path:
    """A file or folder at a fixed place below the `root` of its owner."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __get__(self, owner: StudentFolder | TextFolder | Run, kind: type) -> Path:
        return owner.root.joinpath(*self._parts)


@dataclass(frozen=True, slots=True)
class StudentFolder:
    root: Path

    settings = _Path("student.json")
    """Settings of its training: written before training, compared by later commands."""
    model = _Path("model")
    """The finished model; it exists only after training has ended."""
    checkpoints = _Path("checkpoints")
    """Checkpoints that an interrupted training resumes from."""
    metrics = _Path("metrics.jsonl")
    """Figures of the training: a line of JSON per log step."""
    claim = _Path(".training")
    """Claim that exists while a process trains the student."""
    start = _Path("start")
    """Initial weights made from the teacher; deleted when training has ended."""
    pruning = _Path("pruning.json")
    """Record of a cut: sizes, parameters and loss before and after."""
    rounds = _Path("rounds")
    """Folders of the trainings between the cuts of iterated pruning."""

    def is_begun(self, trainings: int) -> bool:
        """Return whether initial weights exist, so that the teacher is not needed any more.

        trainings  number of trainings, one after each cut
        """
        first = self.rounds / "1"
        earlier = (first / "start", first / "model") if trainings > 1 else ()
        return any(path.is_dir() for path in (self.start, *earlier))

    written = _Path("written")
    """Text that the student wrote after each of its trainings, and the trainings but the last."""

    def training(self, number: int, count: int) -> StudentFolder:
        """Return the folder of one training of a student with rounds; the last one is its own.

        number  number of the training, from 1
        count   number of all its trainings; 1 without rounds
        """
        return self if number == count else StudentFolder(self.written / str(number))

    def text(self, number: int) -> TextFolder:
        """Return the folder of the text that it wrote after a training, counted from 1."""
        return TextFolder(self.written / str(number))

    evaluation = _Path("evaluation.json")
    """Figures on the held-out store."""
    exports = _Path("exports")
    """Exports in other formats, a folder for each."""
    tasks = _Path("tasks.json")
    """Results of lm-eval tasks."""


@dataclass(frozen=True, slots=True)
class TextFolder:
    """What a student wrote after one training, and the teacher's scores of it."""

    root: Path

    text = _Path("text")
    """The text, as a prepared corpus; it exists once it is complete."""
    speed = _Path("writing.json")
    """How fast the student wrote it."""

    def store(self, split: Split) -> Path:
        """Return the folder of the store of a split of the text."""
        return self.root / ("logits" if split == "train" else "heldout")


@dataclass(frozen=True, slots=True)
class Run:
    """All paths of a run."""

    root: Path
    logits_at: str | Path | None = None
    """Address or folder of the store; the folder `logits` of the run if None."""
    heldout_at: str | Path | None = None
    """Address or folder of the held-out store; the folder `heldout` of the run if None."""
    cache: CacheSettings | None = None
    """Local cache of remote stores."""

    teacher = _Path("teacher")
    """Folder of a teacher that is trained here: tokenizer, checkpoints, metrics, model."""
    teacher_settings = _Path("teacher", "teacher.json")
    """Settings of the teacher's training."""
    teacher_model = _Path("teacher", "model")
    """The trained teacher, with its tokenizer."""
    correction = _Path("teacher", "correction.json")
    """Held-out loss of a corrected teacher before and after."""
    tokenizer = _Path("teacher", "tokenizer")
    """The tokenizer that was trained here."""
    corpus = _Path("corpus")
    """The tokenised, packed corpus."""

    @property
    def preparing(self) -> Path:
        """Claim that exists while a process prepares the corpus; the run may not exist yet."""
        return self.root.with_name(f".{self.root.name}.preparing")

    @property
    def logits(self) -> str | Path:
        """The store that students are trained from."""
        return self.logits_at or self.root / "logits"

    @property
    def heldout(self) -> str | Path:
        """The store that students are evaluated on."""
        return self.heldout_at or self.root / "heldout"

    tokens = _Path("tokens")
    """Stores in the tokens of students that have others than the teacher: a folder for each kind of
    tokens, with `logits` and `heldout`."""
    pilot = _Path("pilot.json")
    """Measurements of a pilot before the capture."""
    importance = _Path("importance")
    """Importance of the teacher's parts, which students with `prune` share: a file for each sample
    of sequences."""
    students = _Path("students")
    """One folder per student."""

    def student(self, name: str) -> StudentFolder:
        return StudentFolder(self.students / name)

    @property
    def student_names(self) -> list[str]:
        """Names of the students that have settings here, in alphabetical order."""
        return sorted(p.parent.name for p in self.students.glob("*/student.json"))

    teacher_evaluation = _Path("teacher.evaluation.json")
    """The teacher's own figures on the held-out store."""
    teacher_tasks = _Path("teacher.tasks.json")
    """Results of lm-eval tasks by the teacher."""
    comparison = _Path("comparison.json")
    """The comparison as JSON; beside it the same as Markdown and as a page with plots."""
    report = _Path("report", "index.html")
    """The report page."""
    continuations = _Path("report", "continuations.json")
    """Continuations of held-out prompts by its models, for the report page."""
    verbatim = _Path(VERBATIM)
    """The recipe file as it was written."""
    resolved = _Path(RESOLVED)
    """The validated recipe, with every student that has a folder here."""
    environment = _Path("env.json")
    """Versions of Python and libraries, and the platform."""
    recording = _Path(".recording")
    """Claim that exists while a process writes the recipe and the environment."""


def open_run(folder: Path, name: str, loaded: LoadedRecipe | None = None) -> Run:
    """Return the run `name` below `folder`, with its stores where the recipe puts them.

    Raises
        ColdstillError: the folder is inside coldstill's own source
    """
    root = folder / name
    source = Path(__file__).resolve().parents[2]
    for room in _ROOMS:
        if root.resolve().is_relative_to(source / room):
            raise ColdstillError(
                f"{root}: inside coldstill's own source ({room}/); choose another folder with "
                "--runs"
            )
    return Run(root) if loaded is None else _with_stores(root, loaded)


def recorded_run(root: Path) -> Run:
    """Return the run in a folder, with its stores where its recorded recipe puts them."""
    is_recorded = (root / RESOLVED).is_file()
    return _with_stores(root, load_recipe(str(root))) if is_recorded else Run(root)


def _with_stores(root: Path, loaded: LoadedRecipe) -> Run:
    logits, evaluation = loaded.recipe.logits, loaded.recipe.evaluation

    def place(path: str | None) -> str | Path | None:
        if path is None or "://" in path:
            return path
        return loaded.base / Path(path).expanduser()

    folder = place(logits.cache_folder)
    return Run(
        root,
        logits_at=place(logits.path),
        heldout_at=place(evaluation.path),
        cache=CacheSettings(folder=None if folder is None else Path(folder), bytes=logits.cache),
    )


def record_recipe(run: Run, loaded: LoadedRecipe, *, student: bool = False) -> None:
    """Write the three records into the run's folder.

    student  the next result is a student, so the recorded seed of everything else is kept
    """
    with claimed(run.recording, wait=True):  # other processes may add their students
        with whole_file(run.verbatim) as scratch:
            scratch.write_bytes(loaded.text.encode())
        resolved = _resolved(run, loaded, _recorded_seed(run) if student else None)
        write_json(run.resolved, {"recipe": resolved, "base": str(loaded.base)})
        write_json(run.environment, _environment())


def _resolved(run: Run, loaded: LoadedRecipe, seed: int | None) -> Any:
    recipe = loaded.recipe
    seed = recipe.seed if seed is None else seed
    students = {name: (table, recipe.seed) for name, table in recipe.students.items()}
    for name in run.student_names:
        # a trained student keeps its settings, even if the recipe has changed
        trained = _trained_with(run.student(name))
        if trained is not None and re.fullmatch(NAME_PATTERN, name) and name != TEACHER:
            students[name] = trained
    seeded = {name: _seeded(table, own, seed) for name, (table, own) in students.items()}
    whole = recipe.model_copy(update={"seed": seed, "students": seeded})
    return json.loads(whole.model_dump_json())


def _trained_with(folder: StudentFolder) -> tuple[StudentTable, int] | None:
    """Return a student's table and seed, or None if its record cannot be read."""
    try:
        match read_json(folder.settings):
            case {"student": dict() as table, "seed": int(seed)}:
                return StudentTable.model_validate(table), seed
    except (ColdstillError, ValidationError):
        pass  # reported when this student is used
    return None


def _seeded(student: StudentTable, own: int, seed: int) -> StudentTable:
    """Return the student with its own seed, or without one if it equals the recipe's seed."""
    now = own if student.train.seed is None else student.train.seed
    train = dataclasses.replace(student.train, seed=None if now == seed else now)
    return student.model_copy(update={"train": train})


def _recorded_seed(run: Run) -> int | None:
    try:
        match read_json(run.resolved):
            case {"recipe": {"seed": int(seed)}}:
                return seed
    except ColdstillError:
        pass  # nothing is recorded yet
    return None


def _environment() -> dict[str, str]:
    packages = ["coldstill", "torch", "transformers", "pyarrow", "numpy", "tokenizers"]
    if find_spec("numba") is not None:  # it decodes stores
        packages.append("numba")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **{package: version(package) for package in packages},
    }
