"""What was distilled from what: teacher, corpus, capture and students, from their own records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.prepared import SPLITS, CorpusLayout
from ..pages.inspect.store import counted
from ..recipe.tables import StudentTable
from .columns import CACHED_BYTES
from .curves import in_words
from .names import visible
from .verdict import Upbringing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...data.store.manifest import Manifest
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe, TeacherTable
    from .columns import Row

_TRAINING = ("objective", "teachers", "train", "like")
"""Of a student's table: what is not what it began as."""


def teacher_facts(recipe: Recipe, manifest: Manifest | None) -> dict[str, Any]:
    """Who spoke; without a store nothing but where it came from."""
    found: dict[str, Any] = {"origin": _teacher_origin(recipe.teacher)}
    if manifest is not None:
        found |= {
            "name": manifest.teacher.name,
            "family": manifest.teacher.family,
            "parameters": manifest.teacher.parameters,
            "dtype": manifest.teacher.dtype,
            "fingerprint": manifest.teacher.fingerprint,
        }
    return found


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


def corpus_facts(recipe: Recipe, run: Run, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What was read. Where the prepared corpus is not on this machine, only what the stores say.

    Raises
        ColdstillError: the corpus's record is damaged
    """
    facts: dict[str, Any] = {"files": list(recipe.corpus.files), "splits": {}}
    record = CorpusLayout(run.corpus).read_record()
    if record is None:
        facts["splits"] = {
            m.corpus.split: {"documents": m.corpus.documents, "fingerprint": m.corpus.fingerprint}
            for m in manifests
        }
        return facts
    for split in SPLITS:
        found = record.splits[split]
        facts["splits"][split] = {
            "documents": found.documents,
            "fingerprint": found.content,
            "tokens": found.tokens,
            "positions": found.positions,
            "sequences": found.sequences,
        }
    train, heldout = (record.splits[split] for split in SPLITS)
    documents = train.documents + heldout.documents
    tokens = train.tokens + heldout.tokens
    learned = train.positions + heldout.positions
    return facts | {
        "sources": len(record.sources),
        "documents": documents,
        "tokens": tokens,
        "supervised_share": None if record.prompts else learned / max(1, tokens),
        "heldout_share": heldout.documents / max(1, documents),
        "prompts": record.prompts,
    }


def student_facts(run: Run, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every student of the run, the evaluated ones first and of those the best."""
    order = {row["name"]: place for place, row in enumerate(rows)}
    by_name = {row["name"]: row for row in rows}
    found = [_student(run, name, by_name.get(visible(name))) for name in run.student_names]
    return sorted(found, key=lambda one: (order.get(one["name"], len(order)), one["name"]))


def _student(run: Run, name: str, row: Row | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": visible(name),
        "evaluated": row is not None,
        "trained": run.student(name).model.exists(),
    }
    table = _table(run, name)
    if table is None:
        unknown: dict[str, Any] = {
            "origin": "its record cannot be read",
            "made_of": {},
            "train": None,
        }
        return facts | {**unknown, "listens": _listens({}, row)}
    origin = {
        key: value for key, value in table.items() if key not in _TRAINING and value is not None
    }
    return facts | {
        "origin": origin_in_words(origin),
        "made_of": origin,
        "objective": in_words(table.get("objective")),
        "train": table.get("train"),
        "teachers": _others(table),
        "listens": _listens(table, row),
    }


def _table(run: Run, name: str) -> dict[str, Any] | None:
    try:
        recorded = read_json(run.student(name).settings)
    except ColdstillError:
        return None
    table = recorded.get("student") if isinstance(recorded, dict) else None
    return table if isinstance(table, dict) else None


def _listens(table: Mapping[str, Any], row: Row | None) -> bool | None:
    """Whether its objective reads anything of a teacher's; None if nobody knows."""
    cached = None if row is None else row.get(CACHED_BYTES)
    if cached is not None:  # which is 0 only there
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
    """What a student began as, such as "new llama, 2 layers of width 128"."""
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
    """What one pruning leaves, such as "2 layers, 4 heads"."""
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
    """A table as one would write it in a recipe, without what is not set."""
    if isinstance(value, dict):
        inner = (f"{key} = {_plain(v)}" for key, v in value.items() if v is not None)
        return "{ " + ", ".join(inner) + " }"
    return json.dumps(value, ensure_ascii=False)


def upbringings(students: Sequence[Mapping[str, Any]]) -> dict[str, Upbringing]:
    """The same, of those that are known, for the verdict."""
    return {
        one["name"]: Upbringing(
            listens=one["listens"], origin=one["made_of"], train=_alike(one["train"])
        )
        for one in students
        if one["listens"] is not None
    }


def _alike(train: Any) -> Any:
    """Of a training what can make its end another: not how often it writes down where it is."""
    quiet = ("log_every", "checkpoint_every", "micro_batch_tokens", "seed")
    kept = train if isinstance(train, dict) else {}
    return {key: value for key, value in kept.items() if key not in quiet}
