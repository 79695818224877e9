"""Everything that a report is made of, as one JSON value: the page shows nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.store.reader import open_store
from .cache import record_facts
from .caveats import warnings
from .curves import read_curves
from .lineage import corpus_facts, student_facts, teacher_facts, upbringings
from .names import visible
from .reproduce import reproduction
from .rows import compared_rows
from .verdict import comparable_students, export_sentence, standing, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...data.store.reader import StoreReader
    from ..steps.work import Work
    from .columns import Row
    from .verdict import Upbringing

MOST_STUDENTS = 4
"""That continuations are shown of, the baseline besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What a report is asked to show."""

    prompts: int = 3
    """Held-out prompts that models go on from; none are asked with 0."""


def gather(work: Work, options: ReportOptions) -> dict[str, Any]:
    """All facts of a run's report.

    Raises
        ColdstillError: no student is evaluated yet, or a record that is there is damaged
    """
    run, recipe = work.run, work.recipe
    rows = compared_rows([run])
    logits, no_logits = _opened(work, run.logits, incomplete=True)
    heldout, no_heldout = _opened(work, run.heldout)
    manifests = [store.manifest for store in (logits, heldout) if store is not None]
    students = student_facts(run, rows)
    known = upbringings(students)
    pair = standing(comparable_students(rows, known), known)
    best = None if pair is None else pair.best["name"]
    baseline = None if pair is None or pair.baseline is None else pair.baseline["name"]
    result = [verdict(rows, known), "" if best is None else export_sentence(rows, best)]
    texts, no_texts = _continuations(work, heldout, _shown(rows, known), options)
    return {
        "run": visible(str(run.root)),
        "name": visible(run.root.name),
        "result": " ".join(part for part in result if part),
        "warnings": warnings(rows),
        "teacher": teacher_facts(recipe, manifests[0] if manifests else None),
        "corpus": corpus_facts(recipe, run, manifests),
        "students": students,
        "best": best,
        "baseline": baseline,
        "models": rows,
        "curves": {name: asdict(curve) for name, curve in read_curves([run]).items()},
        "record": None if logits is None else record_facts(logits),
        "no_record": no_logits,
        "heldout": None if heldout is None else _heldout_facts(heldout),
        "continuations": texts,
        "no_continuations": no_heldout or no_texts,
        "reproduce": reproduction(run, rows),
    }


def _opened(
    work: Work, address: str | Path, *, incomplete: bool = False
) -> tuple[StoreReader | None, str]:
    """A store of the run, or why there is none to look at: a student's machine may lack either."""
    try:
        return open_store(address, incomplete=incomplete, cache=work.run.cache), ""
    except (ColdstillError, OSError) as error:
        return None, visible(str(error))


def _heldout_facts(store: StoreReader) -> dict[str, Any]:
    capture = store.manifest.capture
    return {"positions": store.positions, "head": capture.head, "tail": capture.tail}


def _shown(rows: Sequence[Row], students: Mapping[str, Upbringing]) -> list[str]:
    """Whose continuations are shown: the best students, and the baseline that one of them has."""
    own = [row for row in rows if row["name"] in students]
    pair = standing(own, students)
    last = [] if pair is None or pair.baseline is None else [pair.baseline["name"]]
    # the student that the baseline is of is always among them
    first = [] if pair is None else [pair.best["name"], pair.compared["name"]]
    others = [*first, *(row["name"] for row in own)]
    shown = [name for name in dict.fromkeys(others) if name not in last]
    return shown[:MOST_STUDENTS] + last


def _continuations(
    work: Work, heldout: StoreReader | None, names: Sequence[str], options: ReportOptions
) -> tuple[dict[str, Any] | None, str]:
    """What models make of some prompts, or why there is nothing of it."""
    if heldout is None or not options.prompts:
        return None, ""
    from .continuations import continuations

    try:
        return continuations(work, heldout, names, options.prompts), ""
    except ColdstillError as error:  # a damaged store costs this part, not the page
        return None, visible(str(error))
