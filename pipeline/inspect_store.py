"""What a store holds, without loading anything but its own records."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..data.commit import total
from ..data.errors import ColdstillError
from ..data.layout import StoreLayout
from ..data.manifest import read_manifest
from ..data.reader import read_commits
from .compare import size

if TYPE_CHECKING:
    from pathlib import Path


def describe_store(path: Path) -> dict[str, Any]:
    """Manifest, counts and the teacher's own figures, as a JSON value.

    Raises
        ColdstillError: no store there, or a damaged one
    """
    layout = StoreLayout(path)
    if not layout.manifest.exists():
        raise ColdstillError(
            f"{path}: no manifest.json there, so not a store; a run's stores are its folders "
            "logits and heldout"
        )
    manifest = read_manifest(layout.manifest)
    commits = read_commits(layout, manifest)
    sums = total(commits.values())
    positions = sum(c.positions for c in commits.values())
    stored = sum(c.bytes for c in commits.values())
    per = max(1, positions)
    return {
        "path": str(path),
        "manifest": manifest.to_json(),
        "shards": manifest.shards,
        "shards_done": len(commits),
        "shards_missing": [i for i in range(manifest.shards) if i not in commits],
        "sequences": sum(c.sequences for c in commits.values()),
        "document_pieces": sum(c.documents for c in commits.values()),
        "tokens": sum(c.tokens for c in commits.values()),
        "positions": positions,
        "bytes": stored,
        "bytes_per_position": stored / per,
        "teacher_loss": sums.loss / per,
        "teacher_perplexity": math.exp(sums.loss / per),
        "teacher_entropy": sums.entropy / per,
        "teacher_accuracy": sums.correct / per if manifest.capture.head else None,
        "head_mass": sums.head_mass / per,
    }


def text(store: dict[str, Any]) -> str:
    """The same for a person."""
    manifest = store["manifest"]
    teacher, capture, packing = manifest["teacher"], manifest["capture"], manifest["packing"]
    missing = store["shards_missing"]
    gaps = f", missing {_ranges(missing)}" if missing else ", complete"
    temperatures = ", ".join(str(t) for t in (1.0, *capture["temperatures"]))
    together = (
        f"documents packed together, kept apart by {packing['isolation']}"
        if packing["together"]
        else "one document each"
    )
    rows = [
        ("store", f"{store['path']} ({manifest['store']['name']}, {manifest['codec']['name']})"),
        (
            "teacher",
            f"{teacher['name']} ({teacher['family']}, {teacher['parameters']:,} parameters, "
            f"{teacher['dtype']}, {teacher['fingerprint'][:12]})",
        ),
        ("tokenizer", f"{manifest['tokenizer']['size']:,} tokens"),
        (
            "corpus",
            f"{manifest['corpus']['split']}, {manifest['corpus']['documents']:,} documents "
            f"({manifest['corpus']['fingerprint'][:12]})",
        ),
        (
            "packing",
            f"up to {packing['sequence_length']} tokens, {together}",
        ),
        ("capture", f"head {capture['head']}, tail {capture['tail']}, temperatures {temperatures}"),
        ("shards", f"{store['shards_done']} of {store['shards']}{gaps}"),
        (
            "holds",
            f"{store['sequences']:,} sequences, {store['tokens']:,} tokens, "
            f"{store['positions']:,} positions",
        ),
        ("size", f"{size(store['bytes'])}, {store['bytes_per_position']:.1f} bytes a position"),
    ]
    if store["positions"]:
        accuracy = store["teacher_accuracy"]
        top = "" if accuracy is None else f", top-1 accuracy {accuracy:.1%}"
        rows += [
            (
                "says",
                f"loss {store['teacher_loss']:.4f}, perplexity {store['teacher_perplexity']:.2f}, "
                f"entropy {store['teacher_entropy']:.4f} nats{top}",
            ),
            ("head holds", f"{store['head_mass']:.2%} of the probability"),
        ]
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
