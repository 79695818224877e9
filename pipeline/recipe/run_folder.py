"""The folder that a recipe produces. No other file builds a path inside one."""

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
    """One student's part of a run."""

    root: Path

    @property
    def settings(self) -> Path:
        """What it is trained with: written before training, compared ever after."""
        return self.root / "student.json"

    @property
    def model(self) -> Path:
        """The finished model; it exists only when training has ended."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        """What a killed training goes on from."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """What training measured: a line of JSON per log step."""
        return self.root / "metrics.jsonl"

    @property
    def claim(self) -> Path:
        """There while a process trains it."""
        return self.root / ".training"

    @property
    def start(self) -> Path:
        """What a student made of the teacher began with; gone when training has ended."""
        return self.root / "start"

    @property
    def pruning(self) -> Path:
        """What a cut left of the teacher."""
        return self.root / "pruning.json"

    @property
    def rounds(self) -> Path:
        """One folder for each training between the cuts of iterated pruning."""
        return self.root / "rounds"

    def is_begun(self, trainings: int) -> bool:
        """Whether it can be trained without its teacher, whom it is made of.

        trainings  how many it takes
        """
        first = self.rounds / "1"
        earlier = (first / "start", first / "model") if trainings > 1 else ()
        return any(path.is_dir() for path in (self.start, *earlier))

    @property
    def evaluation(self) -> Path:
        """Its figures on the held-out store."""
        return self.root / "evaluation.json"

    @property
    def exports(self) -> Path:
        """It in other formats, a folder each."""
        return self.root / "exports"

    @property
    def tasks(self) -> Path:
        """What it got in tasks of lm-eval."""
        return self.root / "tasks.json"


@dataclass(frozen=True, slots=True)
class Run:
    """All places of a run."""

    root: Path
    logits_at: str | Path | None = None
    """The address or folder of the store, if it is elsewhere;"""
    heldout_at: str | Path | None = None
    """likewise of the other."""
    cache: CacheSettings | None = None
    """What is kept of them here, if they are far away."""

    @property
    def teacher(self) -> Path:
        """Only if it is trained here: tokenizer, checkpoints, metrics, model."""
        return self.root / "teacher"

    @property
    def teacher_settings(self) -> Path:
        """What the teacher is trained with."""
        return self.teacher / "teacher.json"

    @property
    def teacher_model(self) -> Path:
        """The trained teacher, with its tokenizer."""
        return self.teacher / "model"

    @property
    def correction(self) -> Path:
        """The held-out loss of a teacher before and after it was corrected here."""
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
        """There while a process prepares the corpus: beside the run, which may not exist yet."""
        return self.root.with_name(f".{self.root.name}.preparing")

    @property
    def logits(self) -> str | Path:
        """The store that students are trained from."""
        return self.logits_at or self.root / "logits"

    @property
    def heldout(self) -> str | Path:
        """The store that they are evaluated on."""
        return self.heldout_at or self.root / "heldout"

    @property
    def pilot(self) -> Path:
        """What a pilot measured of the teacher before the capture."""
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
        """Those that have a folder, in alphabetical order."""
        return sorted(p.parent.name for p in self.students.glob("*/student.json"))

    @property
    def teacher_evaluation(self) -> Path:
        """The teacher's own figures on the held-out store."""
        return self.root / "teacher.evaluation.json"

    @property
    def teacher_tasks(self) -> Path:
        """What the teacher got in tasks of lm-eval, if it was asked."""
        return self.root / "teacher.tasks.json"

    @property
    def comparison(self) -> Path:
        """The table as JSON; beside it the same as Markdown and as a page with plots."""
        return self.root / "comparison.json"

    @property
    def report(self) -> Path:
        """The page for whoever has a minute."""
        return self.root / "report" / "index.html"

    @property
    def continuations(self) -> Path:
        """What its models made of some held-out prompts, for that page."""
        return self.root / "report" / "continuations.json"

    @property
    def verbatim(self) -> Path:
        """The recipe as it was written."""
        return self.root / VERBATIM

    @property
    def resolved(self) -> Path:
        """The recipe as it was understood, with every student that has a folder here."""
        return self.root / RESOLVED

    @property
    def environment(self) -> Path:
        """The machine."""
        return self.root / "env.json"

    @property
    def recording(self) -> Path:
        """There while a process writes these three."""
        return self.root / ".recording"


def open_run(folder: Path, name: str, loaded: LoadedRecipe | None = None) -> Run:
    """The run `name` below `folder`, with its stores where the recipe says.

    Raises
        ColdstillError: no run may be there
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
    """The run in a folder, with its stores where the recipe it was made by says."""
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
