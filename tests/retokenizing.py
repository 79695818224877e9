"""Texts, merges and captures of the tests of stores in a student's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from coldstill.data.schema import Block, Capture
from tokenizers import Tokenizer

TEXTS = [
    "it is unlikely that the 123 cats", "the cat un likely", "un", "12345 likely the", "é 東京 the",
    "hello the unlikely thecat", "a", "the 12 the 3", " un unlikely 99123",
]  # fmt: skip
MERGES = [
    ("Ġ", "u"), ("Ġu", "n"), ("l", "i"), ("k", "e"), ("ke", "l"), ("kel", "y"), ("li", "kely"),
    ("1", "2"), ("12", "3"), ("t", "h"), ("th", "e"), ("Ġ", "the"),
]  # fmt: skip
ADDED = [*MERGES, ("Ġun", "likely"), ("c", "a"), ("Ã", "©")]
JOINED = [
    ("u", "n"), ("l", "i"), ("k", "e"), ("ke", "l"), ("kel", "y"), ("li", "kely"),
    ("un", "likely"), ("Ġ", "unlikely"),
]  # fmt: skip
"""Two tokens for the teacher's " un", and one for " unlikely", which the teacher begins with it."""
REMOVED = [pair for pair in MERGES if pair not in (("1", "2"), ("12", "3"), ("Ġ", "the"))]
CAPTURES = {
    "samples": Capture(head=0, tail=50),
    "head": Capture(head=8, tail=0),
    "both": Capture(head=8, tail=8, temperatures=(2.0,)),
}
UDHR = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "udhr2-multilingual.jsonl"


def loaded(folder: Path) -> Any:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def matched(old: Block, new: Block, teacher: Any, student: Any) -> list[tuple[int, int]]:
    """Positions of both stores at which a chunk begins, by comparing decoded beginnings."""
    found = []
    rows = [0, 0]
    for sequence in range(len(old)):
        seen: list[dict[tuple[int, bytes], int]] = []
        for side, (block, tokenizer) in enumerate(((old, teacher), (new, student))):
            own: dict[tuple[int, bytes], int] = {}
            tokens = block.sequences.tokens[sequence]
            starts = block.sequences.document_starts[sequence]
            for position in block.sequences.positions[sequence].tolist():
                document = int(np.searchsorted(starts, position, side="right")) - 1
                before = tokens[starts[document] : position + 1].tolist()
                letters = "".join(tokenizer.id_to_token(i) for i in before)
                own[document, letters.encode()] = rows[side]
                rows[side] += 1
            seen.append(own)
        found += [(seen[0][key], seen[1][key]) for key in seen[1] if key in seen[0]]
    return found
