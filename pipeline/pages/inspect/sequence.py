"""One sequence of a store, position by position: tokens and the teacher's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....data.alignment import label_places, labels
from ....data.errors import ColdstillError
from ....data.store.caveats import caveats

if TYPE_CHECKING:
    from ....data.schema import Block
    from ...results.token_texts import TokenTexts
    from .path import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadToken:
    """A token of the head, with its probability."""

    token: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TailSample:
    """A token that was sampled from the tail, and how often."""

    token: int
    count: int
    probability: float | None
    """Known only if the store has the log-probabilities of samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The teacher's stored prediction of the next token at one position."""

    position: int
    label: int
    """The actual next token."""
    place: int
    """Place of the label in the sequence."""
    label_logprob: float
    entropy: float
    rank: int | None
    """Rank of the label in the head, from 1; None if it is outside the head."""
    head: tuple[HeadToken, ...]
    """Tokens of the head, the most probable one first."""
    head_mass: float
    tail_mass: float
    samples: tuple[TailSample, ...]
    """Samples of the tail, the most frequent one first."""

    @property
    def surprise(self) -> float:
        """-log p(label), in nats."""
        return -self.label_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSequence:
    """A sequence, and which part of it is shown."""

    row: int
    """Index in the store."""
    id: int
    """Index in the corpus split."""
    length: int
    """Number of tokens of the whole sequence."""
    shown: range
    """Places that are shown."""
    tokens: tuple[int, ...]
    """All tokens of the sequence, including those that are not shown."""
    documents: dict[int, int]
    """Index of each document in the corpus, by the place where it starts."""
    predictions: dict[int, Prediction]
    """All predictions of the sequence, by position."""
    note: str
    """What the store cannot say, as one sentence; empty if there is nothing."""


def read_sequence(subject: Subject, row: int, positions: range | None = None) -> ShownSequence:
    """Read one sequence; `positions` limits the part that is shown.

    Raises
        ColdstillError: no such sequence or positions, or its shard is missing or damaged
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
    return ShownSequence(
        row=row,
        id=int(sequences.ids[0]),
        length=len(tokens),
        shown=shown,
        tokens=tuple(tokens),
        documents=dict(zip(starts, ids, strict=True)),
        predictions=_predictions(block),
        note="; ".join(caveats(subject.store.manifest)),
    )


def _predictions(block: Block) -> dict[int, Prediction]:
    targets = block.targets
    positions = block.sequences.positions.values.tolist()
    labels_M, places_M = labels(block.sequences), label_places(block.sequences)
    head_MK = np.exp(targets.head_logprobs.astype(np.float64))
    tail_M = np.exp(targets.log_tail.astype(np.float64))
    predictions = {}
    for place, position in enumerate(positions):
        ids = targets.head_ids[place].tolist()
        label = int(labels_M[place])
        pairs = zip(ids, head_MK[place].tolist(), strict=True)
        predictions[position] = Prediction(
            position=position,
            label=label,
            place=int(places_M[place]),
            label_logprob=float(targets.label_logprob[place]),
            entropy=float(targets.entropy[place]),
            rank=ids.index(label) + 1 if label in ids else None,
            head=tuple(HeadToken(token=token, probability=p) for token, p in pairs),
            head_mass=float(head_MK[place].sum()),
            tail_mass=float(tail_M[place]),
            samples=_samples(block, place),
        )
    return predictions


def _samples(block: Block, place: int) -> tuple[TailSample, ...]:
    targets = block.targets
    # no probability is outside the head, so the samples have no weight
    if targets.log_tail[place] == -np.inf:
        return ()
    own = targets.tail.take(np.array([place]))
    known: Any = [None] * len(own.ids) if own.logprobs is None else np.exp(own.logprobs).tolist()
    samples = (
        TailSample(token=token, count=count, probability=probability)
        for token, count, probability in zip(
            own.ids.tolist(), own.counts.tolist(), known, strict=True
        )
    )
    return tuple(sorted(samples, key=lambda sample: (-sample.count, sample.token)))


def to_json(sequence: ShownSequence, texts: TokenTexts, top: int) -> dict[str, Any]:
    """Return the shown part as a JSON value, with the `top` best tokens of each position."""
    document = None
    entries = []
    for place, token in enumerate(sequence.tokens[: sequence.shown.stop]):
        document = sequence.documents.get(place, document)
        if place not in sequence.shown:
            continue
        prediction = sequence.predictions.get(place)
        entries.append(
            {
                "position": place,
                "token": token,
                "text": texts.of(token),
                "document": document,
                "starts_document": place in sequence.documents,
                "target": None if prediction is None else _prediction_json(prediction, texts, top),
            }
        )
    return {
        "sequence": sequence.row,
        "id": sequence.id,
        "tokens": sequence.length,
        "note": "; ".join(filter(None, (texts.lack, sequence.note))),
        "positions": entries,
    }


def _prediction_json(prediction: Prediction, texts: TokenTexts, top: int) -> dict[str, Any]:
    return {
        "label": prediction.label,
        "label_text": texts.of(prediction.label),
        "label_logprob": prediction.label_logprob,
        "label_probability": math.exp(prediction.label_logprob),
        "surprise": prediction.surprise,
        "rank": prediction.rank,
        "entropy": prediction.entropy,
        "head_mass": prediction.head_mass,
        "tail_mass": prediction.tail_mass,
        "best": [
            {"token": g.token, "text": texts.of(g.token), "probability": g.probability}
            for g in prediction.head[:top]
        ],
        "samples": [
            {
                "token": s.token,
                "text": texts.of(s.token),
                "count": s.count,
                "probability": s.probability,
            }
            for s in prediction.samples
        ],
    }
