"""The lineage of a run: its teacher, corpus and students, from their own records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.prepared import SPLITS, CorpusLayout
from ...data.store.caveats import caveats
from ...data.store.provenance import origin_text
from ..recipe.tables import StudentTable
from ..units import counted
from .curves import in_words, recorded_table
from .rows import visible
from .verdict import Training

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...data.store.manifest import Manifest
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe
    from ..recipe.teacher_table import TeacherTable
    from .figures import ModelFigures

_TRAINING = ("objective", "teachers", "train", "like")
"""Keys of a student's table that do not describe its origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFacts:
    """The teacher; only its origin is known without a store."""

    origin: str
    name: str | None = None
    family: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """One split of the corpus; a store gives only its documents and fingerprint."""

    documents: int
    fingerprint: str
    tokens: int | None = None
    positions: int | None = None
    sequences: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFacts:
    """The corpus; most figures are None where the prepared corpus is not on this machine."""

    files: tuple[str, ...]
    splits: dict[str, SplitFacts]
    sources: int | None = None
    """Files that were read."""
    documents: int | None = None
    tokens: int | None = None
    supervised_share: float | None = None
    """Share of tokens that are trained on; None where the teacher writes the answers."""
    heldout_share: float | None = None
    """Share of documents that are held out."""
    prompts: bool | None = None
    """Whether the documents are prompts that the teacher answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    name: str
    evaluated: bool
    trained: bool
    origin: str
    """Its initial weights in words, such as "new llama, 2 layers of width 128"."""
    made_of: dict[str, Any]
    """Its initial weights, as its table in the recipe gives them."""
    train: dict[str, Any] | None = None
    """Its training settings; None where its record cannot be read."""
    objective: str = ""
    teachers: list[str] = field(default_factory=list)
    """Further stores it was trained from, with their weights."""
    uses_teacher: bool | None
    """Whether its objective reads targets of a teacher; None where that is not known."""


def teacher_facts(recipe: Recipe, manifest: Manifest | None) -> TeacherFacts:
    """The teacher of a recipe, as a store's manifest identifies it."""
    origin = _teacher_origin(recipe.teacher)
    if manifest is None:
        return TeacherFacts(origin=origin)
    if manifest.imported is not None:
        origin = origin_text(manifest.imported)
    origin = "; ".join([origin, *caveats(manifest)])
    known = ("name", "family", "parameters", "dtype", "fingerprint")
    return TeacherFacts(origin=origin, **{key: getattr(manifest.teacher, key) for key in known})


def _teacher_origin(teacher: TeacherTable) -> str:
    steps = "" if teacher.train is None else counted(teacher.train.steps, "step")
    if teacher.model is None:
        return f"made here, {steps} on the corpus"
    name = visible(teacher.model.rstrip("/").rpartition("/")[2] if _is_path(teacher.model) else
                   teacher.model)  # fmt: skip
    if teacher.train is None:
        return f"{name}, as it is"
    by = " by adapters" if teacher.lora is not None else ""
    return f"{name}, corrected on the corpus first: {steps}{by}"


def _is_path(model: str) -> bool:
    return model[0] in "./~" or model.count("/") != 1


def corpus_facts(recipe: Recipe, run: Run, manifests: Sequence[Manifest]) -> CorpusFacts:
    """The corpus, from its own record or else from the manifests of stores."""
    files = tuple(recipe.corpus.files)
    record = CorpusLayout(run.corpus).read_record()
    if record is None:
        corpora = [manifest.corpus for manifest in manifests]
        return CorpusFacts(
            files=files,
            splits={
                c.split: SplitFacts(documents=c.documents, fingerprint=c.fingerprint)
                for c in corpora
            },
        )
    splits: dict[str, SplitFacts] = {
        split: SplitFacts(
            documents=(found := record.splits[split]).documents,
            fingerprint=found.content,
            tokens=found.tokens,
            positions=found.positions,
            sequences=found.sequences,
        )
        for split in SPLITS
    }
    train, heldout = (record.splits[split] for split in SPLITS)
    documents, tokens = train.documents + heldout.documents, train.tokens + heldout.tokens
    learned = train.positions + heldout.positions
    return CorpusFacts(
        files=files,
        splits=splits,
        sources=len(record.sources),
        documents=documents,
        tokens=tokens,
        supervised_share=None if record.prompts else learned / max(1, tokens),
        heldout_share=heldout.documents / max(1, documents),
        prompts=record.prompts,
    )


def student_facts(run: Run, rows: Sequence[ModelFigures]) -> list[StudentFacts]:
    """Every student of the run, first the evaluated ones in the order of the rows."""
    order = {row.name: place for place, row in enumerate(rows)}
    by_name = {row.name: row for row in rows}
    found = [_student(run, name, by_name.get(visible(name))) for name in run.student_names]
    return sorted(found, key=lambda one: (order.get(one.name, len(order)), one.name))


def _student(run: Run, name: str, row: ModelFigures | None) -> StudentFacts:
    table = recorded_table(run.student(name).settings, "student")
    known = table or {}
    made_of = {k: value for k, value in known.items() if k not in _TRAINING and value is not None}
    return StudentFacts(
        name=visible(name),
        evaluated=row is not None,
        trained=run.student(name).model.exists(),
        origin="its record cannot be read" if table is None else origin_in_words(made_of),
        made_of=made_of,
        objective=in_words(known.get("objective")),
        train=train if isinstance(train := known.get("train"), dict) else None,
        teachers=_others(known),
        uses_teacher=_uses_teacher(known, row),
    )


def _uses_teacher(table: Mapping[str, Any], row: ModelFigures | None) -> bool | None:
    """Whether its objective reads targets of a teacher; None if that is not known."""
    cached = None if row is None else row.cached_bytes_per_position
    if cached is not None:  # 0 only for an objective that reads none
        return bool(cached)
    from ...stages.targets.losses import LOSSES

    try:
        weights = StudentTable.model_validate(dict(table)).objective.weights
    except ValidationError:
        return None
    return any(LOSSES[loss].needs_targets for loss in weights)


def _others(table: Mapping[str, Any]) -> list[str]:
    parts = table.get("teachers") or []
    named = [part for part in parts if isinstance(part, dict) and part.get("logits")]
    return [f"{part.get('weight')} of {visible(str(part['logits']))}" for part in named]


def origin_in_words(origin: Mapping[str, Any]) -> str:
    """The initial weights of a student in words, such as "new llama, 2 layers of width 128"."""
    parts = []
    for key, value in origin.items():
        if key == "architecture" and isinstance(value, dict):
            layers = counted(int(value.get("layers") or 0), "layer")
            parts.append(f"new {value.get('family')}, {layers} of width {value.get('hidden')}")
        elif key == "model":
            parts.append(f"starts from {visible(str(value))}")
        elif key == "layers" and isinstance(value, dict):
            parts.append(f"of the teacher's layers: {_layers(value)}")
        elif key == "prune" and isinstance(value, dict | list):
            cuts = [value] if isinstance(value, dict) else value
            parts.append(f"pruned out of the teacher: {', then '.join(map(_cut, cuts))}")
        elif key == "lora" and isinstance(value, dict):
            parts.append(f"adapters of rank {value.get('rank')}, merged")
        elif key == "rounds" and isinstance(value, dict):
            own = "on its own text" if value.get("share") else "on the same text"
            parts.append(f"{value.get('count')} rounds {own}")
        elif key == "quantize" and isinstance(value, dict):
            begun = f" after {value['start']:.0%} of the steps" if value.get("start") else ""
            parts.append(f"trained with {value.get('scheme')} weights{begun}")
        else:
            parts.append(f"{key} {_plain(value)}")
    return "; ".join(parts) or "of unknown origin"


def _layers(value: Mapping[str, Any]) -> str:
    if value.get("every"):
        return f"one in {value['every']}"
    if value.get("keep"):
        return f"{value['keep']}, evenly spaced"
    return ", ".join(map(str, value.get("only") or ()))


def _cut(cut: Mapping[str, Any]) -> str:
    """What remains after one pruning, such as "2 layers, 4 heads"."""
    words = {
        "layers": ("{} layer", "{} layers"),
        "hidden": ("width {}",) * 2,
        "feed_forward": ("{} neuron", "{} neurons"),
        "heads": ("{} head", "{} heads"),
        "kv_heads": ("{} key-value head", "{} key-value heads"),
    }
    kept = [
        words[key][cut[key] != 1].format(f"{cut[key]:,}")
        for key in words
        if isinstance(cut.get(key), int)
    ]
    budget = cut.get("parameters")
    if budget is not None:
        kept.append(
            f"{budget:,} parameters"
            if isinstance(budget, int)
            else f"{visible(str(budget))} of its parameters"
        )
    return ", ".join(kept) or "as it is"


def _plain(value: Any) -> str:
    """A table as a recipe writes it, without unset keys."""
    if isinstance(value, dict):
        inner = (f"{key} = {_plain(v)}" for key, v in value.items() if v is not None)
        return "{ " + ", ".join(inner) + " }"
    return json.dumps(value, ensure_ascii=False)


def trainings(students: Sequence[StudentFacts]) -> dict[str, Training]:
    """The training of each student of which it is known whether it used a teacher."""
    return {
        one.name: Training(
            uses_teacher=one.uses_teacher, origin=one.made_of, settings=_settings(one.train)
        )
        for one in students
        if one.uses_teacher is not None
    }


def _settings(train: Any) -> dict[str, Any]:
    """The settings of a training that can change its result."""
    quiet = ("log_every", "checkpoint_every", "micro_batch_tokens", "seed")
    kept = train if isinstance(train, dict) else {}
    return {key: value for key, value in kept.items() if key not in quiet}
