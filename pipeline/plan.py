"""What a recipe will do and cost, told without loading any weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from ..data.corpus import list_sources
from ..data.layout import StoreLayout
from ..data.manifest import read_manifest
from ..data.prepared import SPLITS, CorpusLayout
from ..data.schema import Capture
from .compare import size

if TYPE_CHECKING:
    from pathlib import Path

    from .recipe import LoadedRecipe
    from .run import Run

BYTES_PER_TOKEN = 4
"""A rule of thumb for text before it is tokenised; exact counts take over afterwards."""


def plan(loaded: LoadedRecipe, run: Run) -> dict[str, Any]:
    """The state of every step and the size of what is to come, as a JSON value.

    Raises
        ColdstillError: sources that are not there
    """
    recipe = loaded.recipe
    record = CorpusLayout(run.corpus).read_record()
    sources = list_sources(recipe.corpus.files, loaded.base)
    if record is None:
        tokens = sum(source.bytes for source in sources) // BYTES_PER_TOKEN
        held_out = round(tokens * recipe.corpus.holdout)
        positions = {"train": tokens - held_out, "heldout": held_out}
        sequences = {k: -(-v // recipe.corpus.sequence_length) for k, v in positions.items()}
    else:
        positions = {k: record.splits[k].positions for k in SPLITS}
        sequences = {k: record.splits[k].sequences for k in SPLITS}
    wanted = {"train": recipe.logits.sequences, "heldout": recipe.evaluation.sequences}
    logits, evaluation = recipe.logits, recipe.evaluation
    captures = {
        "train": Capture(head=logits.head, tail=logits.tail, temperatures=logits.temperatures),
        "heldout": Capture(head=evaluation.head, tail=evaluation.tail, tail_logprobs=True),
    }
    stores = {}
    for split, folder in (("train", run.logits), ("heldout", run.heldout)):
        share = min(1.0, (wanted[split] or sequences[split]) / max(1, sequences[split]))
        count = round(positions[split] * share)
        width = plain_bytes(captures[split]) + 8  # tokens, positions and borders beside the targets
        done, shards = _progress(folder)
        stores[split] = {
            "positions": count,
            "bytes_per_position": width,
            "bytes": count * width,
            "shards_done": done,
            "shards": shards,
        }
    students = {
        name: {
            "steps": student.train.steps,
            "tokens": student.train.steps * student.train.batch_tokens,
            "done": run.student(name).model.exists(),
        }
        for name, student in recipe.students.items()
    }
    return {
        "run": str(run.root),
        "sources": len(sources),
        "source_bytes": sum(source.bytes for source in sources),
        "counted": record is not None,
        "sequences": sequences,
        "stores": stores,
        "teacher": recipe.teacher.model or "trained here",
        "teacher_done": recipe.teacher.model is not None or run.teacher_model.exists(),
        "students": students,
        "free_bytes": shutil.disk_usage(_existing(run.root)).free,
    }


def plain_bytes(capture: Capture) -> int:
    """Bytes of one position's target as the `plain` codec writes it."""
    sample = 8 if capture.keeps_tail_logprobs else 4
    return 8 * capture.head + sample * capture.tail + 12 + 4 * len(capture.temperatures)


def text(facts: dict[str, Any]) -> str:
    """The same for a person."""
    about = "" if facts["counted"] else "about "
    lines = [
        f"corpus       {_counted(facts['sources'], 'file')}, {size(facts['source_bytes'])}, "
        f"{about}{sum(facts['sequences'].values()):,} sequences",
        f"teacher      {facts['teacher']}{'' if facts['teacher_done'] else ', not yet'}",
    ]
    for split, store in facts["stores"].items():
        state = (
            f"{store['shards_done']} of {store['shards']} shards" if store["shards"] else "to do"
        )
        lines.append(
            f"{split:<12} {about}{store['positions']:,} positions at "
            f"{store['bytes_per_position']} bytes: {size(store['bytes'])}, {state}"
        )
    for name, student in facts["students"].items():
        state = "trained" if student["done"] else "to do"
        lines.append(
            f"student      {name}: {student['steps']:,} steps of "
            f"{student['tokens'] // student['steps']:,} tokens, {state}"
        )
    needed = sum(s["bytes"] for s in facts["stores"].values())
    enough = "" if needed <= facts["free_bytes"] else ": not enough"
    lines.append(
        f"disk         {size(needed)} for both stores, {size(facts['free_bytes'])} free{enough}"
    )
    return "\n".join(lines)


def _counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _progress(folder: Path) -> tuple[int, int | None]:
    layout = StoreLayout(folder)
    if not layout.manifest.exists():
        return 0, None
    shards = read_manifest(layout.manifest).shards
    return sum(layout.commit(i).exists() for i in range(shards)), shards


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
