"""One HTML page with sequences as text, coloured by the teacher's surprise.

The page is a single file. The data of the store are JSON, from which the script makes text nodes,
so that no corpus can put markup into the page. A policy in the page allows only this script.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.files import whole_file
from ....data.store.commit import ENTROPY_BIN_WIDTH, ENTROPY_BINS
from ...results.token_texts import token_texts
from ..self_contained import expect_file, policy
from .sequence import read_sequence
from .store import describe
from .text import ENTROPY_TITLE, MASS_TITLE, store_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...results.token_texts import TokenTexts
    from .path import Subject
    from .sequence import Prediction, ShownSequence
    from .store import StoreFacts

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("inspect_text.js", "inspect_panel.js")
_STEP = 0.5
"""Nats for each colour."""
_LEVELS = 17
"""Colours: `--s0` to `--s16` of the style, the last one for 8 nats and more."""


def write_page(
    subject: Subject, path: Path, rows: Sequence[int], positions: range | None, top: int
) -> dict[str, Any]:
    """Write the page, and return what it contains as a JSON value."""
    expect_file(path)
    facts = describe(subject)
    sequences = [read_sequence(subject, row, positions) for row in rows]
    texts = token_texts(subject.store)
    content = page(facts, sequences, texts, top).encode()
    with whole_file(path) as scratch:
        scratch.write_bytes(content)
    return {
        "wrote": str(path),
        "sequences": list(rows),
        "tokens": sum(len(sequence.shown) for sequence in sequences),
        "bytes": len(content),
        "note": texts.lack,
    }


def page(facts: StoreFacts, sequences: Sequence[ShownSequence], texts: TokenTexts, top: int) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_TEMPLATES)
    jinja = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    style, *scripts = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("inspect.css", *_SCRIPTS)
    )
    script = "\n".join(scripts)
    data = json.dumps(_data(facts, sequences, texts, top), separators=(",", ":"), allow_nan=False)
    return jinja.get_template("inspect.html").render(
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        # without "<" no text of a corpus can start or end a tag
        data=Markup(data.replace("<", "\\u003c")),
    )


def _data(
    facts: StoreFacts, sequences: Sequence[ShownSequence], texts: TokenTexts, top: int
) -> dict[str, Any]:
    notes = [note for note in (facts.note, texts.lack) if note]
    shown = [_sequence(sequence, top) for sequence in sequences]
    return {
        "title": facts.path,
        "note": "; ".join(notes),
        "table": store_lines(facts)[1:],
        "head": facts.manifest.capture.head,
        "histograms": _histograms(facts),
        "scale": {"step": _STEP, "levels": _LEVELS},
        "texts": {token: texts.of(token) for token in sorted(_tokens(shown))},
        "sequences": shown,
    }


def _sequence(sequence: ShownSequence, top: int) -> dict[str, Any]:
    """Return the tokens, and for each place the prediction that was stored one position before."""
    shown = sequence.shown
    return {
        "row": sequence.row,
        "id": sequence.id,
        "length": sequence.length,
        "first": shown.start,
        "tokens": sequence.tokens[shown.start : shown.stop],
        "documents": list(sequence.documents.items()),
        "predictions": [
            _prediction(one, top) for one in sequence.predictions.values() if one.place in shown
        ],
    }


def _prediction(prediction: Prediction, top: int) -> list[Any]:
    """Return the values in the order in which the script reads them, rounded as shown."""
    return [
        prediction.place,
        prediction.position,
        round(prediction.surprise, 4),
        round(prediction.entropy, 3),
        prediction.rank or 0,
        _short(prediction.head_mass),
        _short(prediction.tail_mass),
        [value for g in prediction.head[:top] for value in (g.token, _short(g.probability))],
        [value for s in prediction.samples for value in (s.token, s.count)],
    ]


def _short(probability: float) -> float:
    return float(f"{probability:.4g}")


def _tokens(sequences: Iterable[dict[str, Any]]) -> set[int]:
    found: set[int] = set()
    for sequence in sequences:
        found.update(sequence["tokens"])
        for *_, head, samples in sequence["predictions"]:
            found.update(head[::2], samples[::2])
    return found


def _histograms(facts: StoreFacts) -> list[dict[str, Any]]:
    """Return titles, counts and names of bins; ticks and means are shares of the width."""
    if not facts.positions:
        return []
    widest = ENTROPY_BINS * ENTROPY_BIN_WIDTH
    starts = facts.entropy.starts
    mean_entropy = facts.known_mean(facts.sums.entropy) or 0.0
    entropy = {
        "title": ENTROPY_TITLE,
        "counts": facts.entropy.positions,
        "bins": [
            *(f"{a:g} to {b:g} nats" for a, b in pairwise(starts)),
            f"{starts[-1]:g} nats and more",
        ],
        "ticks": [(nats / widest, f"{nats}") for nats in (0, 3, 6, 9)] + [(1, "12+")],
        "mean": min(1.0, mean_entropy / widest),
        "meanLabel": f"mean {mean_entropy:.2f}",
    }
    if not facts.manifest.capture.head:
        return [entropy]
    starts = facts.head_mass.starts
    mean_mass = facts.known_mean(facts.sums.head_mass) or 0.0
    mass = {
        "title": MASS_TITLE,
        "counts": facts.head_mass.positions,
        "bins": [f"{start:.0%} to {start + 1 / len(starts):.0%}" for start in starts],
        "ticks": [(share / 4, f"{share / 4:.0%}") for share in range(5)],
        "mean": mean_mass,
        "meanLabel": f"mean {mean_mass:.1%}",
    }
    return [entropy, mass]
