"""One page to look at in a browser: sequences as text, coloured by what surprised the teacher.

The page needs nothing outside itself. Its style, script and outline lie in `templates/`; what is
of the store goes in as JSON, and the script makes text nodes of it, so that no corpus can put
markup into the page. A policy in the page lets a browser run this script and nothing else.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.files import whole_file
from ....data.store.statistics import ENTROPY_BIN_WIDTH, ENTROPY_BINS
from ..self_contained import expect_file, filled, policy
from .sequence import read_passage
from .store import describe, table
from .text import ENTROPY_TITLE, MASS_TITLE
from .tokens import token_texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .path import Subject
    from .sequence import Belief, Passage
    from .tokens import TokenTexts

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("inspect_text.js", "inspect_panel.js")
_STEP = 0.5
"""Nats a colour."""
_LEVELS = 17
"""Colours: `--s0` to `--s16` of the style, the last for 8 nats and more."""


def write_page(
    subject: Subject, path: Path, rows: Sequence[int], positions: range | None, top: int
) -> dict[str, Any]:
    """Write the page whole; tells what it holds, as a JSON value.

    Raises
        ColdstillError: the path is a folder, or a sequence cannot be read
    """
    expect_file(path)
    facts = describe(subject)
    passages = [read_passage(subject, row, positions) for row in rows]
    texts = token_texts(subject.store)
    content = page(facts, passages, texts, top).encode()
    with whole_file(path) as scratch:
        scratch.write_bytes(content)
    return {
        "wrote": str(path),
        "sequences": list(rows),
        "tokens": sum(len(passage.shown) for passage in passages),
        "bytes": len(content),
        "note": texts.lack,
    }


def page(facts: dict[str, Any], passages: Sequence[Passage], texts: TokenTexts, top: int) -> str:
    """The page as HTML."""
    style = (_TEMPLATES / "inspect.css").read_text(encoding="utf-8")
    script = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    data = json.dumps(_data(facts, passages, texts, top), separators=(",", ":"), allow_nan=False)
    parts = {
        "POLICY": policy(style, script),
        "STYLE": style,
        "SCRIPT": script,
        # whatever a corpus holds, no tag begins or ends here
        "DATA": data.replace("<", "\\u003c"),
    }
    return filled((_TEMPLATES / "inspect.html").read_text(encoding="utf-8"), parts)


def _data(
    facts: dict[str, Any], passages: Sequence[Passage], texts: TokenTexts, top: int
) -> dict[str, Any]:
    notes = [note for note in (facts["note"], texts.lack) if note]
    sequences = [_sequence(passage, top) for passage in passages]
    return {
        "title": facts["path"],
        "note": "; ".join(notes),
        "table": table(facts)[1:],
        "head": facts["manifest"]["capture"]["head"],
        "histograms": _histograms(facts),
        "scale": {"step": _STEP, "levels": _LEVELS},
        "texts": {token: texts.of(token) for token in sorted(_tokens(sequences))},
        "sequences": sequences,
    }


def _sequence(passage: Passage, top: int) -> dict[str, Any]:
    """Tokens, and beside them what was expected in their place: the shift is the store's own."""
    shown = passage.shown
    return {
        "row": passage.row,
        "id": passage.id,
        "length": passage.length,
        "first": shown.start,
        "tokens": passage.tokens[shown.start : shown.stop],
        "documents": list(passage.documents.items()),
        "beliefs": [_belief(b, top) for b in passage.beliefs.values() if b.place in shown],
    }


def _belief(belief: Belief, top: int) -> list[Any]:
    """In the order that the script takes it apart; no number longer than it is shown."""
    return [
        belief.place,
        belief.position,
        round(belief.surprise, 4),
        round(belief.entropy, 3),
        belief.rank or 0,
        _short(belief.head_mass),
        _short(belief.tail_mass),
        [value for g in belief.head[:top] for value in (g.token, _short(g.probability))],
        [value for s in belief.samples for value in (s.token, s.count)],
    ]


def _short(probability: float) -> float:
    return float(f"{probability:.4g}")


def _tokens(sequences: Iterable[dict[str, Any]]) -> set[int]:
    """Every id on the page."""
    found: set[int] = set()
    for sequence in sequences:
        found.update(sequence["tokens"])
        for *_, head, samples in sequence["beliefs"]:
            found.update(head[::2], samples[::2])
    return found


def _histograms(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Titles, counts, what to call each bin, ticks and the mean as shares of the width."""
    if not facts["positions"]:
        return []
    bins = facts["histograms"]
    widest = ENTROPY_BINS * ENTROPY_BIN_WIDTH
    starts = bins["entropy"]["from"]
    entropy = {
        "title": ENTROPY_TITLE,
        "counts": bins["entropy"]["positions"],
        "bins": [
            *(f"{a:g} to {b:g} nats" for a, b in pairwise(starts)),
            f"{starts[-1]:g} nats and more",
        ],
        "ticks": [(nats / widest, f"{nats}") for nats in (0, 3, 6, 9)] + [(1, "12+")],
        "mean": min(1.0, facts["teacher_entropy"] / widest),
        "meanLabel": f"mean {facts['teacher_entropy']:.2f}",
    }
    if not facts["manifest"]["capture"]["head"]:
        return [entropy]
    starts = bins["head_mass"]["from"]
    width = 1 / len(starts)
    mass = {
        "title": MASS_TITLE,
        "counts": bins["head_mass"]["positions"],
        "bins": [f"{start:.0%} to {start + width:.0%}" for start in starts],
        "ticks": [(share / 4, f"{share / 4:.0%}") for share in range(5)],
        "mean": facts["head_mass"],
        "meanLabel": f"mean {facts['head_mass']:.1%}",
    }
    return [entropy, mass]
