"""Everything that a report shows, gathered from the records of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...data.errors import ColdstillError
from ...data.store.caveats import not_given
from ...data.store.commit import ENTROPY_BIN_WIDTH, ENTROPY_BINS, MASS_BINS
from ...data.store.manifest import read_measurements
from ...data.store.reader import open_store
from .curves import read_curves
from .figures import json_rows, students_of
from .lineage import corpus_facts, student_facts, teacher_facts, trainings
from .model_tables import warnings
from .reproduce import reproduction
from .rows import compared_rows, visible
from .verdict import ahead_sentence, comparable_students, contest, export_sentence, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...data.codecs import CodecError
    from ...data.schema import Capture
    from ...data.store.commit import ShardStatistics
    from ...data.store.reader import StoreReader
    from ..recipe.work import Work
    from .continuations import Continuations
    from .curves import Curve
    from .figures import ModelFigures
    from .lineage import CorpusFacts, StudentFacts, TeacherFacts
    from .reproduce import Reproduction
    from .verdict import Training


_OF_DISTRIBUTIONS = {"teacher_entropy", "teacher_accuracy", "head_mass"}
_LOGIT_BYTES = 2
"""Bytes of a logit in 16 bits, for the size of a store of all logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Positions for each bin; a bin begins at its value in `starts`."""

    starts: tuple[float, ...]
    positions: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"from": [*self.starts], "positions": [*self.positions]}


def entropy_histogram(sums: ShardStatistics, capture: Capture) -> Histogram:
    """Positions by the teacher's entropy in nats; the last bin has no upper end. Empty if the
    record cannot give it."""
    counts = () if "teacher_entropy" in not_given(capture) else sums.entropy_bins
    return _histogram(counts, ENTROPY_BINS, ENTROPY_BIN_WIDTH)


def mass_histogram(sums: ShardStatistics, capture: Capture) -> Histogram:
    """Positions by the probability inside the head; empty if the record cannot give it."""
    counts = () if "head_mass" in not_given(capture) else sums.mass_bins
    return _histogram(counts, MASS_BINS, 1 / MASS_BINS)


class _Forward(BaseModel):
    """The teacher's forward pass alone."""

    model_config = ConfigDict(frozen=True, extra="allow")
    tokens_per_second: float | None = None


class Measurements(BaseModel):
    """Speed and memory that a capture measured; further keys of the file are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")
    capture_tokens_per_second: float | None = None
    capture_peak_memory_bytes: int | None = None
    forward: _Forward | None = None
    machine: str | None = None

    @classmethod
    def of(cls, store: StoreReader) -> Measurements:
        """The measurements of a store; nothing if the file is missing or damaged."""
        try:
            return cls.model_validate(read_measurements(store.place))
        except ValidationError:
            return cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFacts:
    """A captured store. Means are over all positions; None if it has no position."""

    path: str
    shards: int
    shards_done: int
    sequences: int
    planned_sequences: int
    tokens: int
    positions: int
    bytes: int
    full_logits_bytes: int
    """Size of all logits of these positions at 16 bits each."""
    bytes_per_position: float | None
    teacher_loss: float | None
    """Mean -log p(label) of the teacher in nats; None if the record cannot give it, as for the
    next ones."""
    teacher_entropy: float | None
    head_mass: float | None
    """Mean probability inside the head."""
    codec_kl: float | None
    """Mean KL(captured || stored) in nats."""
    entropy_histogram: Histogram
    mass_histogram: Histogram
    """Positions by the probability inside the head."""
    measurements: Measurements
    capture: Capture
    codec: dict[str, Any]
    """Name and settings."""
    store: dict[str, Any]
    """Name and settings of the shard format."""
    error: CodecError
    vocabulary: int

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["entropy_histogram"], value["mass_histogram"]
        return value | {
            "measurements": self.measurements.model_dump(mode="json", exclude_unset=True),
            "histograms": {
                "entropy": self.entropy_histogram.to_json(),
                "head_mass": self.mass_histogram.to_json(),
            },
        }


def mean_figure(
    value: float, name: str, sums: ShardStatistics, positions: int, capture: Capture
) -> float | None:
    """The mean of a sum over positions; None without any, or if the record cannot give it.

    name  the figure's name in `not_given`. What is summed of distributions is a mean over the
          positions that have one, which in a student's tokens are not all
    """
    count = (sums.known or positions) if name in _OF_DISTRIBUTIONS else positions
    return value / count if count and name not in not_given(capture) else None


def capture_facts(store: StoreReader) -> CaptureFacts:
    """Facts from the manifest, the commit records and the measurements; no sequence is read."""
    manifest, totals = store.manifest, store.totals
    sums, positions, size = totals.statistics, totals.positions, manifest.tokenizer.size

    def mean(value: float, name: str = "") -> float | None:
        return mean_figure(value, name, sums, positions, manifest.capture)

    return CaptureFacts(
        path=str(store.place),
        shards=manifest.shards,
        shards_done=len(store.done),
        sequences=totals.sequences,
        planned_sequences=manifest.sequences,
        tokens=totals.tokens,
        positions=positions,
        bytes=totals.bytes,
        full_logits_bytes=positions * size * _LOGIT_BYTES,
        bytes_per_position=mean(totals.bytes),
        teacher_loss=mean(sums.loss, "teacher_loss"),
        teacher_entropy=mean(sums.entropy, "teacher_entropy"),
        head_mass=mean(sums.head_mass, "head_mass"),
        codec_kl=mean(sums.distortion),
        entropy_histogram=entropy_histogram(sums, manifest.capture),
        mass_histogram=mass_histogram(sums, manifest.capture),
        measurements=Measurements.of(store),
        capture=manifest.capture,
        codec={key: value for key, value in manifest.codec.items() if key != "frequent"},
        store=manifest.store,
        error=manifest.error,
        vocabulary=size,
    )


def _histogram(counts: Sequence[int], bins: int, width: float) -> Histogram:
    return Histogram(
        starts=tuple(place * width for place in range(bins)),
        positions=(*counts, *[0] * (bins - len(counts))),
    )


_MOST_STUDENTS = 4
"""Students whose continuations are shown, besides the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutFacts:
    positions: int
    head: int
    tail: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    run: str
    name: str
    result: str
    """The result in one or two sentences."""
    warnings: list[str]
    teacher: TeacherFacts
    corpus: CorpusFacts
    students: list[StudentFacts]
    best: str | None
    """Name of the best student; None if none was evaluated."""
    baseline: str | None
    """Name of the student without a teacher that the best one is compared with."""
    models: list[ModelFigures]
    curves: dict[str, Curve]
    record: CaptureFacts | None
    no_record: str
    """Why `record` is None; empty otherwise."""
    heldout: HeldoutFacts | None
    continuations: Continuations | None
    no_continuations: str
    """Reason why there are no continuations; empty if none were asked for."""
    reproduce: Reproduction

    def to_json(self) -> dict[str, Any]:
        record = None if self.record is None else self.record.to_json()
        return {**asdict(self), "models": json_rows(self.models), "record": record}


def gather(work: Work, prompts: int) -> ReportFacts:
    """All facts of a run's report.

    prompts  number of held-out prompts for the models to continue

    Raises
        ColdstillError: no student is evaluated yet, or a record is damaged
    """
    run, recipe = work.run, work.recipe
    rows = compared_rows([run])
    logits, no_logits = _opened(work, run.logits, incomplete=True)
    heldout, no_heldout = _opened(work, run.heldout)
    manifests = [store.manifest for store in (logits, heldout) if store is not None]
    students = student_facts(run, rows)
    known = trainings(students)
    pair = contest(comparable_students(rows, known), known)
    result = [
        verdict(rows, known),
        ahead_sentence(rows, known),
        "" if pair is None else export_sentence(rows, pair.best.name),
    ]
    texts, no_texts = _continuations(work, heldout, _shown(rows, known), prompts)
    return ReportFacts(
        run=visible(str(run.root)),
        name=visible(run.root.name),
        result=" ".join(filter(None, result)),
        warnings=warnings(rows),
        teacher=teacher_facts(recipe, manifests[0] if manifests else None),
        corpus=corpus_facts(recipe, run, manifests),
        students=students,
        best=None if pair is None else pair.best.name,
        baseline=None if pair is None or pair.baseline is None else pair.baseline.name,
        models=rows,
        curves=read_curves([run]),
        record=None if logits is None else capture_facts(logits),
        no_record=no_logits,
        heldout=None
        if heldout is None
        else HeldoutFacts(
            positions=heldout.positions,
            head=heldout.manifest.capture.head,
            tail=heldout.manifest.capture.tail,
        ),
        continuations=texts,
        no_continuations=no_heldout or no_texts,
        reproduce=reproduction(run, rows),
    )


def _opened(
    work: Work, address: str | Path, *, incomplete: bool = False
) -> tuple[StoreReader | None, str]:
    """A store of the run, or the reason why it cannot be opened on this machine."""
    try:
        return open_store(address, incomplete=incomplete, cache=work.run.cache), ""
    except (ColdstillError, OSError) as error:
        return None, visible(str(error))


def _shown(rows: Sequence[ModelFigures], known: Mapping[str, Training]) -> list[str]:
    """Students whose continuations are shown: the best ones, and the baseline of one of them."""
    own = [row for row in students_of(rows) if row.name in known]
    pair = contest(own, known)
    last = [] if pair is None or pair.baseline is None else [pair.baseline.name]
    # the student that the baseline belongs to is always shown
    first = [] if pair is None else [pair.best.name, pair.compared.name]
    others = [*first, *(row.name for row in own)]
    shown = [name for name in dict.fromkeys(others) if name not in last]
    return shown[:_MOST_STUDENTS] + last


def _continuations(
    work: Work, heldout: StoreReader | None, names: Sequence[str], prompts: int
) -> tuple[Continuations | None, str]:
    """The models' continuations, or the reason why there are none."""
    if heldout is None or not prompts:
        return None, ""
    from .continuations import continuations

    try:
        return continuations(work, heldout, names, prompts), ""
    except ColdstillError as error:  # the rest of the report does not need the store
        return None, visible(str(error))
