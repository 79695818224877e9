"""One sequence of a store, position by position: the tokens, and what the teacher believed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....data.alignment import label_places, labels
from ....data.errors import ColdstillError

if TYPE_CHECKING:
    from ....data.schema import Block
    from .path import Subject
    from .tokens import TokenTexts


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A token of the head."""

    token: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A token drawn from the tail, and how often."""

    token: int
    count: int
    probability: float | None
    """Where the store keeps it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """What the teacher believed, at one position, about the token that came next."""

    position: int
    label: int
    """The token that came next."""
    place: int
    """Where in the sequence it stands."""
    label_logprob: float
    entropy: float
    rank: int | None
    """Of the label in the head, from 1; None if it is outside."""
    head: tuple[Guess, ...]
    """Most probable first."""
    head_mass: float
    tail_mass: float
    samples: tuple[Sample, ...]
    """The most frequent first."""

    @property
    def surprise(self) -> float:
        """-log p(label), in nats."""
        return -self.label_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A sequence, or the part of it that is shown."""

    row: int
    """Its place in the store."""
    id: int
    """Its place in the corpus split."""
    length: int
    """Of the whole sequence."""
    shown: range
    """Which of its places."""
    tokens: tuple[int, ...]
    """All of the sequence, shown or not."""
    documents: dict[int, int]
    """The corpus place of each document, by where it begins."""
    beliefs: dict[int, Belief]
    """All of the sequence, by position."""


def read_passage(subject: Subject, row: int, positions: range | None = None) -> Passage:
    """Read one sequence; `positions` limits what is shown of it.

    Raises
        ColdstillError: no such sequence or positions, or a shard that is missing or damaged
    """
    subject.expect(row)
    block = subject.store.read(np.array([row]))
    sequences = block.sequences
    tokens = sequences.tokens[0].tolist()
    shown = range(len(tokens))
    if positions is not None:
        shown = shown[positions.start : positions.stop]
        if not shown:
            raise ColdstillError(
                f"{subject.path}: sequence {row} has {len(tokens)} positions, none from "
                f"{positions.start} on"
            )
    starts, ids = sequences.document_starts[0].tolist(), sequences.document_ids[0].tolist()
    return Passage(
        row=row,
        id=int(sequences.ids[0]),
        length=len(tokens),
        shown=shown,
        tokens=tuple(tokens),
        documents=dict(zip(starts, ids, strict=True)),
        beliefs=_beliefs(block),
    )


def _beliefs(block: Block) -> dict[int, Belief]:
    targets = block.targets
    positions = block.sequences.positions.values.tolist()
    labels_M, places_M = labels(block.sequences), label_places(block.sequences)
    head_MK = np.exp(targets.head_logprobs.astype(np.float64))
    tail_M = np.exp(targets.log_tail.astype(np.float64))
    beliefs = {}
    for place, position in enumerate(positions):
        ids = targets.head_ids[place].tolist()
        label = int(labels_M[place])
        pairs = zip(ids, head_MK[place].tolist(), strict=True)
        beliefs[position] = Belief(
            position=position,
            label=label,
            place=int(places_M[place]),
            label_logprob=float(targets.label_logprob[place]),
            entropy=float(targets.entropy[place]),
            rank=ids.index(label) + 1 if label in ids else None,
            head=tuple(Guess(token=token, probability=p) for token, p in pairs),
            head_mass=float(head_MK[place].sum()),
            tail_mass=float(tail_M[place]),
            samples=_samples(block, place),
        )
    return beliefs


def _samples(block: Block, place: int) -> tuple[Sample, ...]:
    targets = block.targets
    # nothing outside the head: what was drawn stands for nothing
    if targets.log_tail[place] == -np.inf:
        return ()
    ids = targets.tail_ids[place].tolist()
    logprobs = None if targets.tail_logprobs is None else targets.tail_logprobs[place].tolist()
    known = {} if logprobs is None else dict(zip(ids, logprobs, strict=True))
    return tuple(
        Sample(token=token, count=count, probability=math.exp(known[token]) if known else None)
        for token, count in Counter(ids).most_common()
    )


def to_json(passage: Passage, texts: TokenTexts, top: int) -> dict[str, Any]:
    """The part that is shown, with the `top` best tokens of each position."""
    document = None
    entries = []
    for place, token in enumerate(passage.tokens[: passage.shown.stop]):
        document = passage.documents.get(place, document)
        if place not in passage.shown:
            continue
        belief = passage.beliefs.get(place)
        entries.append(
            {
                "position": place,
                "token": token,
                "text": texts.of(token),
                "document": document,
                "starts_document": place in passage.documents,
                "target": None if belief is None else _belief_json(belief, texts, top),
            }
        )
    return {
        "sequence": passage.row,
        "id": passage.id,
        "tokens": passage.length,
        "note": texts.lack,
        "positions": entries,
    }


def _belief_json(belief: Belief, texts: TokenTexts, top: int) -> dict[str, Any]:
    return {
        "label": belief.label,
        "label_text": texts.of(belief.label),
        "label_logprob": belief.label_logprob,
        "label_probability": math.exp(belief.label_logprob),
        "surprise": belief.surprise,
        "rank": belief.rank,
        "entropy": belief.entropy,
        "head_mass": belief.head_mass,
        "tail_mass": belief.tail_mass,
        "best": [
            {"token": g.token, "text": texts.of(g.token), "probability": g.probability}
            for g in belief.head[:top]
        ],
        "samples": [
            {
                "token": s.token,
                "text": texts.of(s.token),
                "count": s.count,
                "probability": s.probability,
            }
            for s in belief.samples
        ],
    }
