"""What a store holds, from its own records: no sequence of it is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ....data.files import parse_json
from ....data.store.layout import MEASUREMENTS
from ....data.store.statistics import ENTROPY_BIN_WIDTH, ENTROPY_BINS, MASS_BINS, total
from ...units import size
from .shard import columns_of_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....data.store.commit import Commit
    from ....data.store.reader import StoreReader
    from ....data.store.statistics import ShardStatistics
    from .path import Subject

Facts = dict[str, Any]


def describe(subject: Subject) -> Facts:
    """Manifest, counts and the teacher's own figures, as a JSON value.

    Raises
        ColdstillError: a commit record is damaged, or the shard that is looked at
    """
    store, manifest = subject.store, subject.store.manifest
    commits = [store.commit(index) for index in subject.shards]
    facts: Facts = {
        "path": subject.path,
        "note": subject.note,
        "shard": subject.shard,
        "manifest": manifest.to_json(),
        "shards": manifest.shards,
        "shards_done": len(store.done),
        "shards_missing": sorted(set(range(manifest.shards)) - set(store.done)),
        **_counts(commits),
        **_figures(total(commit.statistics for commit in commits), commits, manifest.capture.head),
        "measurements": _measurements(store),
    }
    if subject.shard is not None:
        rows = manifest.shard_rows(subject.shard)
        facts |= {"rows": [rows.start, rows.stop], "columns": columns_of_shard(subject)}
    return facts


def _counts(commits: Sequence[Commit]) -> Facts:
    positions = sum(commit.positions for commit in commits)
    stored = sum(commit.bytes for commit in commits)
    return {
        "sequences": sum(commit.sequences for commit in commits),
        "document_pieces": sum(commit.documents for commit in commits),
        "tokens": sum(commit.tokens for commit in commits),
        "positions": positions,
        "bytes": stored,
        "bytes_per_position": stored / positions if positions else None,
    }


def _figures(sums: ShardStatistics, commits: Sequence[Commit], head: int) -> Facts:
    """Means over all positions, none where there is none; histograms with the bins' lower ends."""
    positions = sum(commit.positions for commit in commits)

    def mean(value: float) -> float | None:
        return value / positions if positions else None

    return {
        "teacher_loss": mean(sums.loss),
        "teacher_perplexity": math.exp(sums.loss / positions) if positions else None,
        "teacher_entropy": mean(sums.entropy),
        "teacher_accuracy": mean(sums.correct) if head else None,
        "head_mass": mean(sums.head_mass),
        "codec_kl": mean(sums.distortion),
        "histograms": {
            "entropy": {
                "from": [place * ENTROPY_BIN_WIDTH for place in range(ENTROPY_BINS)],
                "positions": _padded(sums.entropy_bins, ENTROPY_BINS),
            },
            "head_mass": {
                "from": [place / MASS_BINS for place in range(MASS_BINS)],
                "positions": _padded(sums.mass_bins, MASS_BINS),
            },
        },
    }


def _padded(counts: Sequence[int], bins: int) -> list[int]:
    return [*counts, *[0] * (bins - len(counts))]


def _measurements(store: StoreReader) -> Facts:
    """What the capture measured of itself; no part of the record, so a damaged one is none."""
    if not store.place.exists(MEASUREMENTS):
        return {}
    try:
        value = parse_json(store.place.read(MEASUREMENTS), store.place.path(MEASUREMENTS))
    except ColdstillError:
        return {}
    return value if isinstance(value, dict) else {}


def table(facts: Facts) -> list[tuple[str, str]]:
    """The same for a person: a name and a sentence each."""
    manifest = facts["manifest"]
    rows = [("store", f"{facts['path']} ({settings_in_words(manifest['store'])})")]
    rows += _identities(manifest)
    missing = facts["shards_missing"]
    gaps = f", missing {ranges(missing)}" if missing else ", complete"
    rows.append(("shards", f"{facts['shards_done']} of {facts['shards']}{gaps}"))
    if facts["shard"] is not None:
        first, end = facts["rows"]
        rows.append(
            (
                "this shard",
                f"{facts['shard']}: sequences {first} to {end - 1}; the rest is of it alone",
            )
        )
    rows.append(
        (
            "holds",
            f"{counted(facts['sequences'], 'sequence')} ({facts['document_pieces']:,} documents or "
            f"pieces of them), {facts['tokens']:,} tokens, {facts['positions']:,} positions",
        )
    )
    if facts["positions"]:
        per = facts["bytes_per_position"]
        rows.append(("size", f"{size(facts['bytes'])}, {per:.1f} bytes a position"))
        rows += _beliefs(facts)
    return rows + _speed(facts["measurements"])


def _identities(manifest: Facts) -> list[tuple[str, str]]:
    teacher, capture, packing = manifest["teacher"], manifest["capture"], manifest["packing"]
    tokenizer, corpus = manifest["tokenizer"], manifest["corpus"]
    together = (
        f"documents packed together, kept apart by {packing['isolation']}"
        if packing["together"]
        else "one document each"
    )
    temperatures = ", ".join(str(t) for t in (1.0, *capture["temperatures"]))
    known = ", samples with their log-probabilities" if capture["tail_logprobs"] else ""
    return [
        (
            "teacher",
            f"{teacher['name']} ({teacher['family']}, {teacher['parameters']:,} parameters, "
            f"{teacher['dtype']}, {teacher['fingerprint'][:12]})",
        ),
        ("tokenizer", f"{tokenizer['size']:,} tokens ({tokenizer['fingerprint'][:12]})"),
        (
            "corpus",
            f"{corpus['split']}, {corpus['documents']:,} documents ({corpus['fingerprint'][:12]})",
        ),
        ("packing", f"up to {packing['sequence_length']} tokens, {together}"),
        (
            "capture",
            f"head {capture['head']}, tail {capture['tail']}, temperatures {temperatures}{known}",
        ),
        ("codec", settings_in_words(manifest["codec"])),
    ]


def _beliefs(facts: Facts) -> list[tuple[str, str]]:
    error, accuracy = facts["manifest"]["error"], facts["teacher_accuracy"]
    top = "" if accuracy is None else f", top-1 accuracy {accuracy:.1%}"
    exact = (
        "none, "
        if error["maximum"] == 0.0
        else (f"at most {error['maximum']:.4f} in sqrt(p), {error['measured']:.4f} measured, ")
    )
    return [
        ("error", f"{exact}mean KL {facts['codec_kl']:.2g} nats a position"),
        (
            "says",
            f"loss {facts['teacher_loss']:.4f}, perplexity {facts['teacher_perplexity']:,.2f}, "
            f"entropy {facts['teacher_entropy']:.4f} nats{top}",
        ),
        ("head holds", f"{facts['head_mass']:.2%} of the probability"),
    ]


def _speed(measured: Facts) -> list[tuple[str, str]]:
    parts = []
    if isinstance(speed := measured.get("capture_tokens_per_second"), float | int):
        parts.append(f"captured at {speed:,.0f} tokens/s")
    forward = measured.get("forward")
    alone = forward.get("tokens_per_second") if isinstance(forward, dict) else None
    if isinstance(alone, float | int):
        parts.append(f"the teacher's forward pass alone {alone:,.0f}")
    if isinstance(memory := measured.get("capture_peak_memory_bytes"), int) and memory:
        parts.append(f"peak memory {size(memory)}")
    if isinstance(machine := measured.get("machine"), str):
        parts.append(machine)
    return [("speed", ", ".join(parts))] if parts else []


def settings_in_words(value: Facts) -> str:
    """`compact, levels 127` for a codec or a store."""
    others = [f"{key} {v:,}" if isinstance(v, int) else f"{key} {v}" for key, v in value.items()]
    return ", ".join([value["name"], *(text for text in others if not text.startswith("name "))])


def counted(count: int, noun: str) -> str:
    """`1 sequence`, `2 sequences`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
