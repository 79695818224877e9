"""The report as one page: a single file without scripts, which can be printed and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...recipe.tables import TEACHER
from ...results.model_tables import without_calibration
from ...results.token_texts import legible
from ...units import counted, size
from ..compare.page import table_values
from ..compare.plots import learning_curves
from ..inspect.store import settings_in_words
from ..self_contained import rendered, write_file
from .pictures import covered_mass, entropies, trade_offs

if TYPE_CHECKING:
    from pathlib import Path

    from ...results.continuations import Continuations
    from ...results.facts import CaptureFacts, HeldoutFacts, Measurements, ReportFacts
    from ...results.lineage import CorpusFacts, StudentFacts, TeacherFacts


Lines = list[tuple[str, str]]
"""Names and values; a template leaves out empty values."""
_MOST = 6
"""Students that are listed; the table has them all."""


def cards(facts: ReportFacts) -> list[tuple[str, str, Lines]]:
    """Title, CSS class and lines of the boxes that the students were distilled from."""
    return [
        ("Teacher", "first", _teacher(facts.teacher)),
        ("Corpus", "plus", _corpus(facts.corpus)),
        ("Record", "then", _record(facts.record, facts.no_record)),
    ]


def _teacher(teacher: TeacherFacts) -> Lines:
    if teacher.name is None:
        return [("origin", teacher.origin)]
    return [
        ("name", teacher.name),
        ("family", f"{teacher.family}, {teacher.dtype}"),
        ("size", f"{teacher.parameters:,} parameters"),
        ("origin", teacher.origin),
        ("fingerprint", (teacher.fingerprint or "")[:12]),
    ]


def _corpus(corpus: CorpusFacts) -> Lines:
    files = ", ".join(corpus.files)
    if corpus.sources is not None:
        files += f" ({counted(corpus.sources, 'file')})"
    train, held = corpus.splits.get("train"), corpus.splits.get("heldout")
    first = train or held
    fingerprint = ("fingerprint", first.fingerprint[:12] if first else "")
    if corpus.documents is None or train is None or held is None:
        splits = corpus.splits.items()
        counts = [("documents", f"{one.documents:,} ({split})") for split, one in splits]
        return [("files", files), *counts, fingerprint]
    share = corpus.supervised_share
    return [
        ("files", files),
        ("documents", f"{corpus.documents:,}, {corpus.heldout_share:.1%} of them held out"),
        ("tokens", f"{train.tokens:,}, and {held.tokens:,} held out"),
        ("learned", "the teacher's answers" if share is None else f"{share:.1%} of all tokens"),
        fingerprint,
    ]


def _record(record: CaptureFacts | None, no_record: str) -> Lines:
    if record is None:
        return [("not here", no_record)]
    capture = record.capture
    temperatures = ", ".join(f"{t:g}" for t in (1.0, *capture.temperatures))
    return [
        ("head", counted(capture.head, "most probable token") if capture.head else "none"),
        ("tail", counted(capture.tail, "sample") if capture.tail else "none"),
        ("temperatures" if capture.temperatures else "temperature", temperatures),
        ("codec", record.codec["name"]),
        ("store", record.store["name"]),
        ("holds", f"{counted(record.sequences, 'sequence')} in {size(record.bytes)}"),
    ]


def student_lines(facts: ReportFacts) -> list[tuple[str, str, str]]:
    """Name, kind and description of some students, always with those of the result."""
    students = facts.students
    chosen = {facts.best, facts.baseline}
    first = [one for one in students if one.name in chosen]
    others = [one for one in students if one.name not in chosen]
    shown = [*first, *others[: max(0, _MOST - len(first))]]
    baselines = sum(one.uses_teacher is False for one in students)
    return [_student(one, facts.baseline, baselines) for one in students if one in shown]


def _student(student: StudentFacts, baseline: str | None, baselines: int) -> tuple[str, str, str]:
    kinds = ["no teacher"] if student.uses_teacher is False else []
    if student.name == baseline and baselines > 1:
        kinds.append("the baseline")
    if not student.evaluated:
        kinds.append("not evaluated")
    objective = [f"objective {student.objective}"] if student.objective else []
    steps = (student.train or {}).get("steps")
    parts = [
        student.origin,
        ", ".join([*objective, *(f"also {part}" for part in student.teachers)]),
        counted(steps, "step") if isinstance(steps, int) else "",
    ]
    return student.name, ", ".join(kinds), "; ".join(filter(None, parts))


def record_lines(record: CaptureFacts, heldout: HeldoutFacts | None) -> Lines:
    """Names and values of the store, and the teacher's figures on it."""
    gaps = record.shards - record.shards_done
    missing = f"; {gaps} of {record.shards} shards missing" if gaps else ""
    full, stored = record.full_logits_bytes, record.bytes
    codec = "nothing: every number is as it was captured"
    if record.error.maximum:
        codec = f"KL {record.codec_kl:.2g} nats a position"
    return [
        ("positions", f"{record.positions:,} in {counted(record.sequences, 'sequence')}{missing}"),
        ("a position", f"{record.bytes_per_position:.1f} bytes, tokens included"),
        ("in all", size(stored)),
        (
            "full logits",
            f"{size(full)} at 16 bits each, {full / max(1, stored):,.0f} times as much",
        ),
        ("codec", settings_in_words(record.codec)),
        ("codec costs", codec),
        (
            "head holds",
            ""
            if record.head_mass is None or not record.capture.head
            else f"{record.head_mass:.1%} of the probability",
        ),
        (
            "teacher",
            ""
            if record.teacher_loss is None
            else f"loss {record.teacher_loss:.4f}, entropy {record.teacher_entropy:.4f} nats",
        ),
        *_speed(record.measurements),
        ("held out", _heldout(heldout)),
    ]


def _speed(measured: Measurements) -> Lines:
    speed, memory = measured.capture_tokens_per_second, measured.capture_peak_memory_bytes
    return [
        ("captured at", "" if speed is None else f"{speed:,.0f} tokens/s"),
        ("peak memory", size(memory) if memory else ""),
        ("machine", measured.machine or ""),
    ]


def _heldout(heldout: HeldoutFacts | None) -> str:
    if heldout is None:
        return ""
    kept = f"head {heldout.head:,}, tail {heldout.tail:,}"
    return f"{heldout.positions:,} more positions to measure on ({kept})"


def environment_lines(facts: ReportFacts) -> Lines:
    """The run's folder, its machine, and the versions it was made with."""
    made = facts.reproduce.environment
    versions = [f"{name} {made[name]}" for name in sorted(made) if name != "platform"]
    return [
        ("run", facts.run),
        ("machine", "; ".join(facts.reproduce.machines)),
        ("platform", made.get("platform", "")),
        ("versions", ", ".join(versions)),
    ]


def plain(text: str) -> str:
    """Text of a file with visible control characters and plain line ends."""
    return legible(text.replace("\r\n", "\n").encode())


def texts_caption(texts: Continuations) -> str:
    """How prompts were chosen and tokens sampled, and which models are missing."""
    count = len(texts.prompts)
    few = f" (of {texts.asked} asked for)" if count < texts.asked else ""
    parts = [
        f"Beginnings of {counted(count, 'held-out document')}{few}, chosen at random by seed "
        f"{texts.seed}. Tokens are sampled at temperature {texts.temperature:g} with the same "
        "random numbers for every model: where two models agree, so do their texts. Loss and KL "
        "above say more than a few texts.",
        "What all prompts begin and end with is left out." if texts.framed else "",
        *(
            f"{'Teacher' if name == TEACHER else name}: not shown, {why}."
            for name, why in texts.missing.items()
        ),
        f"{texts.note}." if texts.note else "",
    ]
    return " ".join(filter(None, parts))


def no_texts(facts: ReportFacts) -> str:
    """The reason why there are no continuations; empty if there are some or none were asked for."""
    if facts.continuations is None:
        return f"Not shown: {facts.no_continuations}." if facts.no_continuations else ""
    if facts.continuations.prompts:
        return ""
    return "No held-out document is long enough for a prompt and what follows."


_LOST = (
    "Changed settings cannot be given on the command line; recipe.resolved.json in the run has "
    "every setting."
)


def write_page(path: Path, facts: ReportFacts) -> None:
    """Write the page of a report whole."""
    write_file(path, page(facts))


def page(facts: ReportFacts) -> str:
    rows, record, again = facts.models, facts.record, facts.reproduce
    notes = list(facts.warnings)
    if old := without_calibration(rows):
        notes.append(
            f"Figures of {', '.join(old)} are of an older version; coldstill evaluate measures "
            "what they lack."
        )
    curves = {row.name: facts.curves[row.name] for row in rows if row.name in facts.curves}
    record_plots, numbers, no_record = [], [], ""
    if record is None or not record.positions:
        no_record = facts.no_record or "it holds no position yet"
    else:
        numbers = record_lines(record, facts.heldout)
        record_plots = [] if record.teacher_entropy is None else [entropies(record)]
        if record.capture.head and record.head_mass is not None:
            record_plots.append(covered_mass(record))
    return rendered(
        "report.html",
        command="report",
        title=facts.name,
        result=facts.result,
        notes=notes,
        cards=cards(facts),
        students=student_lines(facts),
        count=len(facts.students),
        plots=[*trade_offs(rows), learning_curves(rows, curves)],
        no_record=no_record,
        numbers=numbers,
        record_plots=record_plots,
        texts=facts.continuations,
        texts_caption=texts_caption(facts.continuations) if facts.continuations else "",
        no_texts=no_texts(facts),
        teacher=TEACHER,
        baseline=facts.baseline,
        commands=plain("\n".join(again.commands)),
        again_note=_LOST if again.recipe is not None and again.settings is None else "",
        again=environment_lines(facts),
        recipe=None if again.recipe is None else plain(again.recipe),
        **table_values(rows),
    )
