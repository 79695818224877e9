"""What a recipe will do and cost, told without loading any weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.corpus import list_sources
from ...data.schema import Capture
from ..steps.trainable import expect_trainable
from .loadable import expect_loadable_models, expect_packable_students
from .measured import capture_hours, capture_speeds, training_hours
from .memory import memory, student_family, student_sizes, teacher_sizes
from .pilot_record import read_pilot
from .room import free_bytes
from .rowless import left_out_tokens
from .sizes import (
    StoreSize,
    captures,
    corpus_sizes,
    expected_bytes,
    pilot_row,
    store_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.prepared import Split
    from ...stages.planning.model_sizes import ModelSizes
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe, StudentTable

_OTHERS = ((0, 24), (16, 16), (50, 0), (4, 20))
"""(head, tail) that a capture is held against: an unbiased sample alone, both, top-k as others keep
it, and both at about half of its size."""


def plan(loaded: LoadedRecipe, run: Run) -> dict[str, Any]:
    """The state of every step and the size of what is to come, as a JSON value.

    Raises
        ColdstillError: sources that are not there, a damaged record of what was done, tokens that
            a model has no row for, settings of a training that the trainer does not take, models
            that cannot be loaded, students that cannot learn from the store
    """
    recipe = loaded.recipe
    expect_trainable(recipe, recipe.students, teacher=True)
    expect_packable_students(loaded, run)
    left_out = left_out_tokens(loaded, run)
    corpus = corpus_sizes(loaded, run)
    stores = store_sizes(loaded, run, corpus)
    captured = all(store.shards_done == store.shards for store in stores.values())
    expect_loadable_models(loaded, run, captured=captured)
    teacher = teacher_sizes(loaded, run)
    sizes = student_sizes(loaded, run, teacher)
    sources = list_sources(recipe.corpus.files, loaded.base)
    counted = all(split.counted for split in corpus.values())
    return {
        "run": str(run.root),
        "sources": len(sources),
        "source_bytes": sum(source.bytes for source in sources),
        "counted": counted,
        "sequences": {split: size.sequences for split, size in corpus.items()},
        "positions": {split: size.positions for split, size in corpus.items()},
        "supervised_share": {
            split: round(size.positions / max(1, size.tokens), 4) for split, size in corpus.items()
        },
        "basis": corpus["train"].basis,
        "stores": {split: _store_facts(store) for split, store in stores.items()},
        "capture": {"head": recipe.logits.head, "tail": recipe.logits.tail},
        "codec": recipe.logits.codec_name,
        "alternatives": _alternatives(recipe, run, stores["train"]),
        "teacher": recipe.teacher.model or "trained here",
        "left_out_tokens": left_out,
        "teacher_done": not recipe.teacher.is_trained_here or run.teacher_model.exists(),
        "students": {
            name: {
                "steps": _steps(student),
                "tokens": _steps(student) * student.train.batch_tokens,
                "parameters": None if (known := sizes[name]) is None else known.parameters,
                "done": run.student(name).model.exists(),
                "note": _note(name, student, known, teacher),
                "not_exported_to": _not_exported_to(loaded, run, student),
            }
            for name, student in recipe.students.items()
        },
        "memory": memory(loaded, run),
        **_times(recipe, run, stores),
        "cache_bytes": recipe.logits.cache,
        "free_bytes": free_bytes(run.root),
    }


def _steps(student: StudentTable) -> int:
    """Of all trainings that it takes."""
    return student.train.steps * max(1, len(student.prune or ()))


def _store_facts(store: StoreSize) -> dict[str, Any]:
    facts = asdict(store)
    del facts["split"]
    folder = facts.pop("folder")
    return {
        **facts,
        "shards_missing": store.shards - store.shards_done,
        "free_bytes": None if folder is None else free_bytes(folder),
    }


def _alternatives(recipe: Recipe, run: Run, store: StoreSize) -> list[dict[str, Any]]:
    """Four other ways of keeping the same positions: other captures, and the other codec."""
    own = captures(recipe)["train"]
    pilot = read_pilot(recipe, run)
    other = "compact" if recipe.logits.codec_name == "plain" else "plain"
    ways = [(head, tail, "compact") for head, tail in _OTHERS]
    ways.insert(3, (own.head, own.tail, other))
    current = (own.head, own.tail, recipe.logits.codec_name)
    rows = []
    for head, tail, codec in [way for way in dict.fromkeys(ways) if way != current][:4]:
        capture = Capture(head=head, tail=tail, temperatures=own.temperatures)
        row = pilot_row(pilot, capture, codec)
        width = row["bytes_per_position"] if row else expected_bytes(capture, codec)
        rows.append(
            {
                "head": head,
                "tail": tail,
                "codec": codec,
                "bytes_per_position": round(width, 1),
                "measured": "pilot" if row else None,
                "bytes": round(store.positions * width),
            }
        )
    return rows


def _times(recipe: Recipe, run: Run, stores: Mapping[Split, StoreSize]) -> dict[str, Any]:
    """Hours that are left of each stage, where a speed was measured."""
    length = recipe.corpus.sequence_length
    speeds = capture_speeds(recipe, run)
    hours: dict[str, float | None] = {}
    if recipe.teacher.train is not None:
        hours["train-teacher"] = (
            0.0
            if run.teacher_model.exists()
            else training_hours(recipe.teacher.train, run.teacher, length)
        )
    hours["teacher-logits"] = capture_hours(stores, speeds, length)
    for name, student in recipe.students.items():
        folder = run.student(name)
        done = folder.model.exists()
        if student.prune:
            hours[f"prune-student {name}"] = None
        once = len(student.prune or ()) < 2  # each round has a model and a speed of its own
        hours[f"train-student {name}"] = (
            0.0 if done else training_hours(student.train, folder.root, length) if once else None
        )
    return {"tokens_per_second": speeds["train"], "hours": hours}


def _not_exported_to(loaded: LoadedRecipe, run: Run, student: StudentTable) -> list[str]:
    """Formats that no student of this family can be exported to, as far as it is known here."""
    from ...stages.export import FORMATS
    from ...stages.export.families import unable

    family = student_family(loaded, run, student)
    return [] if family is None else unable(family, tuple(FORMATS))


def _note(
    name: str, student: StudentTable, left: ModelSizes | None, teacher: ModelSizes | None
) -> str | None:
    """What a person should know before the student is made."""
    from ...stages.planning.model_sizes import unused_size
    from ...stages.students.pruning.shapes import shortfall

    if student.architecture is not None:
        return unused_size(student.architecture, f"students.{name}.architecture")
    if student.prune is None or left is None or teacher is None:
        return None
    where = f"students.{name}.prune"
    return shortfall(student.prune[-1], left.parameters, teacher.parameters, where)
