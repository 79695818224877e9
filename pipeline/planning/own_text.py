"""The texts that students with `rounds` write, and the teacher's scores of them: bytes and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.places.place import place_at
from ...data.prepared import CorpusLayout
from .costs import round_hours, writing_speed
from .sizes import done_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.prepared import CorpusRecord, Split
    from ...stages.students.rounds.config import RoundsConfig
    from ..recipe.run_folder import TextFolder
    from ..recipe.work import Work
    from .sizes import StoreSize


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """A split of the text that a student writes after one training, and its store."""

    round: int
    split: Split
    prompts: int
    tokens: int
    """Tokens of all prompts and answers."""
    positions: int
    """Tokens of all answers."""
    counted: bool
    """Whether the text is written; before, the numbers are the most that there can be."""
    bytes: int
    """Bytes of its store."""
    bytes_missing: int
    positions_missing: int
    """Positions that the teacher has not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsPlan:
    """What the rounds of a student take. Times are those that are left."""

    texts: list[TextPlan]
    train_hours: float | None
    """None without a measured speed, or with several cuts, whose models have speeds of their
    own."""
    write_hours: float | None
    """None before the student has written once."""
    capture_hours: float | None
    """None without a measured speed of the teacher."""


def plan_rounds(
    work: Work,
    name: str,
    stores: Mapping[Split, StoreSize],
    speeds: Mapping[Split, float | None],
) -> RoundsPlan:
    """The rounds of one student.

    speeds  tokens per second of the teacher's capture, by split
    """
    student, folder = work.recipe.student(name), work.run.student(name)
    rounds = student.rounds
    assert rounds is not None
    corpus = CorpusLayout(work.run.corpus).read_record()
    texts: list[TextPlan] = []
    for number in range(1, rounds.count + 1):
        for split in rounds.written(number):
            documents = None if corpus is None else corpus.splits[split].documents
            text, store = folder.text(number), stores[split]
            texts.append(_text(text, rounds, number, split, documents, store))
    waiting: dict[Split, int] = {"train": 0, "heldout": 0}
    for one in texts:
        waiting[one.split] += round(one.tokens * one.positions_missing / max(1, one.positions))
    scoring: float | None = 0.0
    for split, tokens in waiting.items():
        speed = speeds[split]
        if tokens and scoring is not None:
            scoring = None if speed is None else scoring + tokens / speed / 3600
    unwritten = sum(text.positions for text in texts if not text.counted)
    writing = writing_speed(folder, rounds.count)
    length = work.recipe.corpus.sequence_length
    return RoundsPlan(
        texts=texts,
        train_hours=round_hours(student, folder, length),
        write_hours=(
            0.0 if not unwritten else None if writing is None else unwritten / writing / 3600
        ),
        capture_hours=scoring,
    )


def _text(
    folder: TextFolder,
    rounds: RoundsConfig,
    number: int,
    split: Split,
    documents: int | None,
    store: StoreSize,
) -> TextPlan:
    """One split of one text.

    documents  documents of this split of the corpus; None if it is not prepared
    store      the first store, whose positions take as many bytes as those of this one
    """
    record: CorpusRecord | None = CorpusLayout(folder.text).read_record()
    prompts = rounds.prompts if split == "train" else rounds.heldout
    prompts = prompts if documents is None else min(prompts, documents)
    positions = prompts * rounds.max_new_tokens
    tokens = positions + prompts * rounds.prompt_tokens
    if record is not None:
        written = record.splits[split]
        prompts, tokens, positions = written.documents, written.tokens, written.positions
    done = done_of(place_at(folder.store(split)))
    left = max(0, positions - done.positions)
    missing = round(left * store.bytes_per_position)
    return TextPlan(
        round=number,
        split=split,
        prompts=prompts,
        tokens=tokens,
        positions=positions,
        counted=record is not None,
        bytes=done.bytes + missing,
        bytes_missing=missing,
        positions_missing=left,
    )
