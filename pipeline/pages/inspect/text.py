"""A store, a shard or a sequence as text, drawn with block characters or with ASCII."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....data.store.caveats import caveats
from ....data.store.provenance import origin_text
from ...units import counted, display_width, size
from .store import column_lines, ranges, retokenized_lines, settings_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....data.store.manifest import Manifest, TeacherIdentity
    from ...results.token_texts import TokenTexts
    from .sequence import Prediction, ShownSequence
    from .store import LoneShardFacts, StoreFacts


COLUMNS = 100
"""Width of all text in columns."""
_INDENT = " " * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The characters of one way to draw."""

    bars: str
    """Bars from empty to full."""
    space: str
    newline: str
    tab: str
    quote: str
    """Around a token."""
    rule: str
    times: str
    mark: str
    """Before the actual next token."""

    def visible(self, text: str) -> str:
        """Return a token with visible blanks and line ends."""
        marks = {" ": self.space, "\n": self.newline, "\t": self.tab}
        text = "".join(marks.get(letter, letter) for letter in text)
        if self is ASCII:
            text = text.encode("ascii", "backslashreplace").decode()
        return f"{self.quote}{text}{self.quote}"


BLOCKS = Glyphs(
    bars=" \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588",
    space="\u00b7",
    newline="\u21b5",
    tab="\u21e5",
    quote="",
    rule="\u2500",
    times="\u00d7",
    mark="\u25b8",
)
ASCII = Glyphs(
    bars=" .:#", space=" ", newline="\\n", tab="\\t", quote='"', rule="-", times="x", mark="=>"
)


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return the characters that an output with this encoding can show."""
    try:
        (BLOCKS.bars + BLOCKS.space + BLOCKS.newline + BLOCKS.tab).encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return ASCII
    return BLOCKS


def histogram(counts: Sequence[int], glyphs: Glyphs, *, height: int, width: int = 2) -> list[str]:
    """Return lines of equal width, the top line first; each bar is `width` columns wide.

    A count above 0 is always visible.
    """
    steps = len(glyphs.bars) - 1
    most = max(1, *counts) if counts else 1
    levels = [-(-count * height * steps // most) for count in counts]
    return [
        "".join(glyphs.bars[min(steps, max(0, n - row * steps))] * width for n in levels)
        for row in reversed(range(height))
    ]


def cell(text: str, width: int) -> str:
    """Return text padded or clipped to a width."""
    text = clip(text, width)
    return text + " " * (width - display_width(text))


def clip(text: str, width: int) -> str:
    """Return text of at most this width; three dots stand for the rest."""
    if display_width(text) <= width:
        return text
    kept = ""
    for letter in text:
        if display_width(kept + letter) > width - 3:
            break
        kept += letter
    return kept + "..."


def _flow(items: Sequence[str], first: str = _INDENT) -> list[str]:
    """Return items two blanks apart in lines of `COLUMNS`; `first` is before the first item."""
    lines: list[str] = []
    line = first
    for item in items:
        gap = "" if line in (first, _INDENT) else "  "
        if gap and display_width(line + gap + item) > COLUMNS:
            lines.append(line)
            line, gap = _INDENT, ""
        line += gap + item
    return [*lines, line]


_NAMES = 11
_HEIGHT = 4
_GAP = 5
ENTROPY_TITLE = "positions by the teacher's entropy, in nats"
MASS_TITLE = "positions by probability inside the head"
_ENTROPY_TICKS = [(0, "0"), (6, "3"), (12, "6"), (18, "9"), (23, "11.5+")]
_MASS_TICKS = [(0, "0%"), (5, "25%"), (10, "50%"), (15, "75%"), (20, "100%")]


def store_text(facts: StoreFacts, glyphs: Glyphs) -> str:
    """Return the facts of a store, or of one shard of it."""
    lines = [*_note(facts.note), *_aligned(store_lines(facts))]
    if facts.columns is not None:
        lines += ["", *column_lines(facts.columns)]
    if facts.positions:
        lines += ["", *_histograms(facts, glyphs)]
    return "\n".join(lines)


def lone_text(facts: LoneShardFacts) -> str:
    rows = [
        ("shard", f"{facts.path} ({facts.store}, {size(facts.bytes)})"),
        ("holds", counted(facts.sequences, "sequence")),
    ]
    return "\n".join([*_note(facts.note), *_aligned(rows), "", *column_lines(facts.columns)])


def store_lines(facts: StoreFacts) -> list[tuple[str, str]]:
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


def _engines(teacher: TeacherIdentity) -> str:
    """What ran the teacher, if that was not transformers alone."""
    if teacher.engines == (None,):
        return ""
    names = ["transformers" if e is None else f"{e.name} {e.version}" for e in teacher.engines]
    return f", run by {' and '.join(names)}"


def _identities(facts: StoreFacts) -> list[tuple[str, str]]:
    manifest = facts.manifest
    teacher, capture, packing = manifest.teacher, manifest.capture, manifest.packing
    tokenizer, corpus = manifest.tokenizer, manifest.corpus
    apart = "one request each" if packing.isolation == "documents" else packing.isolation
    together = (
        f"documents packed together, kept apart by {apart}"
        if packing.together
        else "one document each"
    )
    temperatures = ", ".join(str(t) for t in (1.0, *capture.temperatures))
    known = ", samples with their log-probabilities" if capture.tail_logprobs else ""
    return [
        (
            "teacher",
            f"{teacher.name} ({teacher.family}, {teacher.parameters:,} parameters, "
            f"{teacher.dtype}, {teacher.fingerprint[:12]})" + _engines(teacher)
            if teacher.fingerprint
            else f"{teacher.name} (its weights are not known)",
        ),
        *_provenance(manifest),
        ("tokenizer", f"{tokenizer.size:,} tokens ({tokenizer.fingerprint[:12]})"),
        ("corpus", f"{corpus.split}, {corpus.documents:,} documents ({corpus.fingerprint[:12]})"),
        ("packing", f"up to {packing.sequence_length} tokens, {together}"),
        (
            "capture",
            f"head {capture.head}, tail {capture.tail}, temperatures {temperatures}{known}",
        ),
        ("codec", settings_in_words(manifest.codec)),
        *retokenized_lines(manifest.retokenized),
    ]


def _provenance(manifest: Manifest) -> list[tuple[str, str]]:
    """Where a store comes from that another program wrote, and what a store lacks."""
    imported = manifest.imported
    rows, lacks, counts = [], caveats(manifest), list[str]()
    if imported is not None:
        score = imported.measured.get(imported.alignment, 0.0)
        rows = [("from", f"{origin_text(imported)} (mean 1/rank of the label {score:.2f})")]
        lacks = [*imported.lost, *lacks]
        counts = [f"{count:,} {what}" for what, count in imported.counts.items()]
    for title, sentences in (("lacks", lacks), ("counted", counts)):
        rows += [(title if n == 0 else "", sentence) for n, sentence in enumerate(sentences)]
    return rows


def _figures(facts: StoreFacts) -> list[tuple[str, str]]:
    error, sums, positions = facts.manifest.error, facts.sums, facts.positions
    loss, entropy = facts.teacher_loss, facts.teacher_entropy
    quality = []
    if loss is not None:
        quality += [f"loss {loss:.4f}", f"perplexity {math.exp(loss):,.2f}"]
    if entropy is not None:
        quality.append(f"entropy {entropy:.4f} nats")
    if facts.teacher_accuracy is not None:
        quality.append(f"top-1 accuracy {facts.teacher_accuracy:.1%}")
    held = facts.mean(sums.head_mass, "head_mass")
    exact = (
        "none"
        if error.maximum == 0.0
        else f"at most {error.maximum:.4f} in sqrt(p), {error.measured:.4f} measured"
    )
    return [
        ("error", f"{exact}, mean KL {sums.distortion / positions:.2g} nats a position"),
        *([("quality", ", ".join(quality))] if quality else []),
        *([] if held is None else [("head holds", f"{held:.2%} of the probability")]),
    ]


def _speed(facts: StoreFacts) -> list[tuple[str, str]]:
    measured, parts = facts.measurements, []
    if (speed := measured.capture_tokens_per_second) is not None:
        parts.append(f"captured at {speed:,.0f} tokens/s")
    forward = measured.forward
    if forward is not None and (alone := forward.tokens_per_second) is not None:
        parts.append(f"the teacher's forward pass alone {alone:,.0f}")
    if memory := measured.capture_peak_memory_bytes:
        parts.append(f"peak memory {size(memory)}")
    if (machine := measured.machine) is not None:
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
    """Draw the histograms that the record can give side by side."""
    drawn = []
    if facts.teacher_entropy is not None:
        drawn.append(_drawn(ENTROPY_TITLE, facts.entropy.positions, _ENTROPY_TICKS, glyphs))
    if facts.mean_head_mass is not None:
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


_WIDTH = 22
"""Width of a token's column."""


def listing(sequence: ShownSequence, texts: TokenTexts, glyphs: Glyphs, top: int, path: str) -> str:
    """Return an explanation and every position that is shown."""
    lines = _head(sequence, texts, glyphs, path)
    for place in sequence.shown:
        if place in sequence.documents or place == sequence.shown.start:
            lines.append(_border(sequence, place, glyphs))
        lines += _position(sequence, place, texts, glyphs, top)
    return "\n".join(lines)


def _head(sequence: ShownSequence, texts: TokenTexts, glyphs: Glyphs, path: str) -> list[str]:
    shown, documents = sequence.shown, counted(len(sequence.documents), "document")
    part = "" if len(shown) == sequence.length else f"; shown are {shown.start} to {shown.stop - 1}"
    summary = (
        f"sequence {sequence.row} of {path}: number {sequence.id} of its corpus, "
        f"{counted(sequence.length, 'token')}, {documents}, "
        f"{counted(len(sequence.predictions), 'position')} with a target{part}"
    )
    how = (
        "Each line has a token and the teacher's prediction of the next one (label), made from all "
        "tokens so far: p is the probability of the label, rank its place in the head; "
        f"{glyphs.mark} marks the label among the best tokens. A dash means no target."
    )
    lines = [*textwrap.wrap(summary, COLUMNS), *textwrap.wrap(how, COLUMNS)]
    for note in filter(None, (texts.lack, sequence.note)):
        lines += textwrap.wrap(note, COLUMNS)
    return [*lines, "", f"{'pos':>6}  {'token':<{_WIDTH}}  {'label':<{_WIDTH}}  {_NUMBERS}"]


_NUMBERS = f"{'p':>8}  {'-log p':>6}  {'rank':>5}  {'entropy':>7}"


def _border(sequence: ShownSequence, place: int, glyphs: Glyphs) -> str:
    start = max(begin for begin in sequence.documents if begin <= place)
    rest = "" if start == place else ", continued"
    return f"{glyphs.rule * 2} document {sequence.documents[start]}{rest} ".ljust(
        COLUMNS, glyphs.rule
    )


def _position(
    sequence: ShownSequence, place: int, texts: TokenTexts, glyphs: Glyphs, top: int
) -> list[str]:
    token = cell(glyphs.visible(texts.of(sequence.tokens[place])), _WIDTH)
    prediction = sequence.predictions.get(place)
    if prediction is None:
        return [f"{place:>6}  {token}  -"]
    label = cell(glyphs.visible(texts.of(prediction.label)), _WIDTH)
    rank = "-" if prediction.rank is None else str(prediction.rank)
    numbers = (
        f"{percent(math.exp(prediction.label_logprob)):>8}  {prediction.surprise:>6.2f}  "
        f"{rank:>5}  {prediction.entropy:>7.2f}"
    )
    return [f"{place:>6}  {token}  {label}  {numbers}", *_details(prediction, texts, glyphs, top)]


def _details(prediction: Prediction, texts: TokenTexts, glyphs: Glyphs, top: int) -> list[str]:
    """Return lines with the best tokens, and with the samples outside the head."""
    lines = []
    if best := [
        f"{glyphs.mark if guess.token == prediction.label else ''}"
        f"{clip(glyphs.visible(texts.of(guess.token)), _WIDTH)} {percent(guess.probability)}"
        for guess in prediction.head[:top]
    ]:
        lines += _flow(best)
    masses = f"{_INDENT}head {percent(prediction.head_mass)}, tail {percent(prediction.tail_mass)}"
    drawn = [
        clip(glyphs.visible(texts.of(sample.token)), _WIDTH)
        + (f" {glyphs.times}{sample.count}" if sample.count > 1 else "")
        for sample in prediction.samples
    ]
    return lines + _flow(drawn, f"{masses}{': ' if drawn else ''}")


def percent(probability: float) -> str:
    """Return a percentage with two or three digits: `73.1%`, `0.45%`, `<0.001%`."""
    share = 100 * probability
    if share >= 0.01:
        return f"{share:.1f}%" if share >= 10 else f"{share:.2f}%"
    return f"{share:.3f}%" if share >= 0.001 else "<0.001%" if share else "0%"
