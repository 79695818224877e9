"""A store or a shard as text: aligned, at most 100 columns, with two small histograms."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from ...units import counted, size
from .glyphs import COLUMNS, histogram
from .shard import column_lines
from .store import ranges, settings_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .glyphs import Glyphs
    from .shard import LoneShardFacts
    from .store import StoreFacts

_NAMES = 11
_HEIGHT = 4
_GAP = 5
ENTROPY_TITLE = "positions by the teacher's entropy, in nats"
MASS_TITLE = "positions by probability inside the head"
_ENTROPY_TICKS = [(0, "0"), (6, "3"), (12, "6"), (18, "9"), (23, "11.5+")]
_MASS_TICKS = [(0, "0%"), (5, "25%"), (10, "50%"), (15, "75%"), (20, "100%")]


def store_text(facts: StoreFacts, glyphs: Glyphs) -> str:
    """Return the facts of a store, or of one shard of it."""
    lines = [*_note(facts.note), *_aligned(table(facts))]
    if facts.columns is not None:
        lines += ["", *column_lines(facts.columns)]
    if facts.positions:
        lines += ["", *_histograms(facts, glyphs)]
    return "\n".join(lines)


def lone_text(facts: LoneShardFacts) -> str:
    """Return the facts of a shard without its store."""
    rows = [
        ("shard", f"{facts.path} ({facts.store}, {size(facts.bytes)})"),
        ("holds", counted(facts.sequences, "sequence")),
    ]
    return "\n".join([*_note(facts.note), *_aligned(rows), "", *column_lines(facts.columns)])


def table(facts: StoreFacts) -> list[tuple[str, str]]:
    """Return the facts as pairs of a name and a text."""
    missing = facts.shards_missing
    gaps = f"missing {ranges(missing)}" if missing else "complete"
    rows = [
        ("store", f"{facts.path} ({settings_in_words(facts.manifest.store)})"),
        *_identities(facts),
        ("shards", f"{len(facts.done)} of {facts.manifest.shards}, {gaps}"),
    ]
    if facts.rows is not None:
        first, end = facts.rows
        text = f"{facts.shard}: sequences {first} to {end - 1}; all lines below are about it alone"
        rows.append(("this shard", text))
    holds = (
        f"{counted(facts.sequences, 'sequence')} ({facts.document_pieces:,} documents or pieces of "
        f"them), {facts.tokens:,} tokens, {facts.positions:,} positions"
    )
    rows.append(("holds", holds))
    if facts.positions:
        per = facts.bytes / facts.positions
        rows.append(("size", f"{size(facts.bytes)}, {per:.1f} bytes a position"))
        rows += _figures(facts)
    return rows + _speed(facts)


def _identities(facts: StoreFacts) -> list[tuple[str, str]]:
    manifest = facts.manifest
    teacher, capture, packing = manifest.teacher, manifest.capture, manifest.packing
    tokenizer, corpus = manifest.tokenizer, manifest.corpus
    together = (
        f"documents packed together, kept apart by {packing.isolation}"
        if packing.together
        else "one document each"
    )
    temperatures = ", ".join(str(t) for t in (1.0, *capture.temperatures))
    known = ", samples with their log-probabilities" if capture.tail_logprobs else ""
    return [
        (
            "teacher",
            f"{teacher.name} ({teacher.family}, {teacher.parameters:,} parameters, "
            f"{teacher.dtype}, {teacher.fingerprint[:12]})",
        ),
        ("tokenizer", f"{tokenizer.size:,} tokens ({tokenizer.fingerprint[:12]})"),
        (
            "corpus",
            f"{corpus.split}, {corpus.documents:,} documents ({corpus.fingerprint[:12]})",
        ),
        ("packing", f"up to {packing.sequence_length} tokens, {together}"),
        (
            "capture",
            f"head {capture.head}, tail {capture.tail}, temperatures {temperatures}{known}",
        ),
        ("codec", settings_in_words(manifest.codec)),
    ]


def _figures(facts: StoreFacts) -> list[tuple[str, str]]:
    error, sums, positions = facts.manifest.error, facts.sums, facts.positions
    accuracy, loss = facts.teacher_accuracy, sums.loss / positions
    top = "" if accuracy is None else f", top-1 accuracy {accuracy:.1%}"
    exact = (
        "none"
        if error.maximum == 0.0
        else f"at most {error.maximum:.4f} in sqrt(p), {error.measured:.4f} measured"
    )
    return [
        ("error", f"{exact}, mean KL {sums.distortion / positions:.2g} nats a position"),
        (
            "says",
            f"loss {loss:.4f}, perplexity {math.exp(loss):,.2f}, "
            f"entropy {sums.entropy / positions:.4f} nats{top}",
        ),
        ("head holds", f"{sums.head_mass / positions:.2%} of the probability"),
    ]


def _speed(facts: StoreFacts) -> list[tuple[str, str]]:
    measured, parts = facts.measurements, []
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


def _note(note: str) -> list[str]:
    return [*textwrap.wrap(note, COLUMNS), ""] if note else []


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for name, value in rows:
        line = f"{name:<{_NAMES}} "
        for place, part in enumerate(value.split(", ")):
            # lines break between parts only, so that no path is cut and units stay with numbers
            if place and len(line) + len(part) + 3 > COLUMNS:
                lines.append(line + ",")
                line = " " * (_NAMES + 1) + part
            else:
                line += f"{', ' if place else ''}{part}"
        lines.append(line)
    return lines


def _histograms(facts: StoreFacts, glyphs: Glyphs) -> list[str]:
    """Draw both histograms side by side; the second one only if the store has a head."""
    drawn = [_drawn(ENTROPY_TITLE, facts.entropy.positions, _ENTROPY_TICKS, glyphs)]
    if facts.manifest.capture.head:
        drawn.append(_drawn(MASS_TITLE, facts.head_mass.positions, _MASS_TICKS, glyphs))
    widths = [max(len(line) for line in block) for block in drawn]
    return [
        (" " * _GAP).join(line.ljust(w) for line, w in zip(lines, widths, strict=True)).rstrip()
        for lines in zip(*drawn, strict=True)
    ]


def _drawn(
    title: str, counts: Sequence[int], ticks: Sequence[tuple[int, str]], glyphs: Glyphs
) -> list[str]:
    """Draw two columns for each bar; a tick is below the left end of its bar."""
    axis = ""
    for place, label in ticks:
        axis = axis.ljust(2 * place) + label
    return [title, *histogram(counts, glyphs, height=_HEIGHT), glyphs.rule * 2 * len(counts), axis]
