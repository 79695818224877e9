"""The folder of a run. No other file builds a path inside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.places.cache_settings import CacheSettings
from .reading import RESOLVED, VERBATIM, load_recipe

if TYPE_CHECKING:
    from .reading import LoadedRecipe

_ROOMS = ("pipeline", "stages", "data", "tests")


@dataclass(frozen=True, slots=True)
class StudentFolder:
    """The folder of one student."""

    root: Path

    @property
    def settings(self) -> Path:
        """Settings of its training: written before training, compared by later commands."""
        return self.root / "student.json"

    @property
    def model(self) -> Path:
        """The finished model; it exists only after training has ended."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints that an interrupted training resumes from."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Figures of the training: a line of JSON per log step."""
        return self.root / "metrics.jsonl"

    @property
    def claim(self) -> Path:
        """Claim that exists while a process trains the student."""
        return self.root / ".training"

    @property
    def start(self) -> Path:
        """Initial weights made from the teacher; deleted when training has ended."""
        return self.root / "start"

    @property
    def pruning(self) -> Path:
        """Record of a cut: sizes, parameters and loss before and after."""
        return self.root / "pruning.json"

    @property
    def rounds(self) -> Path:
        """Folders of the trainings between the cuts of iterated pruning."""
        return self.root / "rounds"

    def is_begun(self, trainings: int) -> bool:
        """Return whether initial weights exist, so that the teacher is not needed any more.

        trainings  number of trainings, one after each cut
        """
        first = self.rounds / "1"
        earlier = (first / "start", first / "model") if trainings > 1 else ()
        return any(path.is_dir() for path in (self.start, *earlier))

    @property
    def evaluation(self) -> Path:
        """Figures on the held-out store."""
        return self.root / "evaluation.json"

    @property
    def exports(self) -> Path:
        """Exports in other formats, a folder for each."""
        return self.root / "exports"

    @property
    def tasks(self) -> Path:
        """Results of lm-eval tasks."""
        return self.root / "tasks.json"


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

    @property
    def teacher(self) -> Path:
        """Folder of a teacher that is trained here: tokenizer, checkpoints, metrics, model."""
        return self.root / "teacher"

    @property
    def teacher_settings(self) -> Path:
        """Settings of the teacher's training."""
        return self.teacher / "teacher.json"

    @property
    def teacher_model(self) -> Path:
        """The trained teacher, with its tokenizer."""
        return self.teacher / "model"

    @property
    def correction(self) -> Path:
        """Held-out loss of a corrected teacher before and after."""
        return self.teacher / "correction.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained here."""
        return self.teacher / "tokenizer"

    @property
    def corpus(self) -> Path:
        """The tokenised, packed corpus."""
        return self.root / "corpus"

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

    @property
    def pilot(self) -> Path:
        """Measurements of a pilot before the capture."""
        return self.root / "pilot.json"

    @property
    def students(self) -> Path:
        """One folder per student."""
        return self.root / "students"

    def student(self, name: str) -> StudentFolder:
        """One student's folder."""
        return StudentFolder(self.students / name)

    @property
    def student_names(self) -> list[str]:
        """Names of the students that have settings here, in alphabetical order."""
        return sorted(p.parent.name for p in self.students.glob("*/student.json"))

    @property
    def teacher_evaluation(self) -> Path:
        """The teacher's own figures on the held-out store."""
        return self.root / "teacher.evaluation.json"

    @property
    def teacher_tasks(self) -> Path:
        """Results of lm-eval tasks by the teacher."""
        return self.root / "teacher.tasks.json"

    @property
    def comparison(self) -> Path:
        """The comparison as JSON; beside it the same as Markdown and as a page with plots."""
        return self.root / "comparison.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report" / "index.html"

    @property
    def continuations(self) -> Path:
        """Continuations of held-out prompts by its models, for the report page."""
        return self.root / "report" / "continuations.json"

    @property
    def verbatim(self) -> Path:
        """The recipe file as it was written."""
        return self.root / VERBATIM

    @property
    def resolved(self) -> Path:
        """The validated recipe, with every student that has a folder here."""
        return self.root / RESOLVED

    @property
    def environment(self) -> Path:
        """Versions of Python and libraries, and the platform."""
        return self.root / "env.json"

    @property
    def recording(self) -> Path:
        """Claim that exists while a process writes the recipe and the environment."""
        return self.root / ".recording"


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
