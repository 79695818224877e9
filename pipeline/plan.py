"""What a recipe will do and cost, told without loading any weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from ..data.corpus import list_sources
from ..data.layout import MANIFEST
from ..data.manifest import read_manifest
from ..data.place import place_at
from ..data.prepared import SPLITS, CorpusLayout
from ..data.reader import finished_shards
from ..data.schema import Capture
from .compare import size

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.place import Place
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
    for split, folder, codec in (
        ("train", run.logits, logits.codec_name),
        ("heldout", run.heldout, "plain"),
    ):
        share = min(1.0, (wanted[split] or sequences[split]) / max(1, sequences[split]))
        count = round(positions[split] * share)
        width = expected_bytes(captures[split], codec)
        place = place_at(folder)
        done, shards = _progress(place)
        stores[split] = {
            "positions": count,
            "bytes_per_position": width,
            "bytes": count * width,
            "shards_done": done,
            "shards": shards,
            "address": None if place.room is None else str(place),
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
        "cache_bytes": logits.cache,
        "free_bytes": shutil.disk_usage(_existing(run.root)).free,
    }


def expected_bytes(capture: Capture, codec: str) -> int:
    """Bytes of one position: exact for `plain`, about for `compact`, which has to see the data."""
    if codec == "compact":
        # measured: 1.0 to 1.3 bytes an entry, 6 for the tokens and numbers beside it
        samples = (3 if capture.keeps_tail_logprobs else 1.1) * capture.tail
        return round(7 + 1.3 * capture.head + samples + 4 * len(capture.temperatures))
    sample = 8 if capture.keeps_tail_logprobs else 4
    # tokens, positions and borders beside the targets
    return 8 + 8 * capture.head + sample * capture.tail + 12 + 4 * len(capture.temperatures)


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
        where = "" if store["address"] is None else f", in {store['address']}"
        lines.append(
            f"{split:<12} {about}{store['positions']:,} positions at "
            f"{store['bytes_per_position']} bytes: {size(store['bytes'])}, {state}{where}"
        )
    for name, student in facts["students"].items():
        state = "trained" if student["done"] else "to do"
        lines.append(
            f"student      {name}: {student['steps']:,} steps of "
            f"{student['tokens'] // student['steps']:,} tokens, {state}"
        )
    needed, what = _disk(facts)
    enough = "" if needed <= facts["free_bytes"] else ": not enough"
    lines.append(
        f"disk         {size(needed)} for {what}, {size(facts['free_bytes'])} free{enough}"
    )
    return "\n".join(lines)


def _counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _disk(facts: dict[str, Any]) -> tuple[int, str]:
    """What is needed of this machine's disk, and for what."""
    stores = facts["stores"].values()
    here = [store["bytes"] for store in stores if store["address"] is None]
    distant = sum(store["bytes"] for store in stores if store["address"] is not None)
    names = ["no store", "one store", "both stores"][len(here)]
    if len(here) == len(stores):
        return sum(here), names
    kept = min(distant, facts["cache_bytes"])
    return sum(here) + kept, f"{names} and the cache of the other" if here else "the cache"


def _progress(place: Place) -> tuple[int, int | None]:
    if not place.exists(MANIFEST):
        return 0, None
    manifest = read_manifest(place)
    return len(finished_shards(place, manifest)), manifest.shards


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
