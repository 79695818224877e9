"""The stores of students that have other tokens than the teacher: bytes and time.

Once the teacher is captured, a sample of each store is written in the student's tokens, to a
temporary folder. Before, its positions follow from a sample of the corpus in both tokenizers.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.places.place import place_at
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ..recipe.own_tokens import own_tokens
from .models import folder_of, named_teacher, tokenizer_of_model
from .sizes import done_of, tokens_in

if TYPE_CHECKING:
    from ...data.maintenance.retokenize import Sampled
    from ...data.prepared import Split
    from ...data.store.manifest import TokenizerIdentity
    from ..recipe.own_tokens import OwnTokens
    from ..recipe.work import Work
    from .sizes import StoreSize

_SAMPLE_TOKENS = 8192
"""Tokens of a store that are written for a sample: a few seconds, and bytes within a tenth."""
_FOLDERS: dict[Split, str] = {"train": "logits", "heldout": "heldout"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensPlan:
    """The stores in the tokens of students that have others than the teacher."""

    students: list[str]
    stores: dict[Split, StoreSize]
    hours: float | None
    """Time to write what is missing; None before the teacher is captured."""
    note: str | None
    """What an estimate lacks."""


def plan_own_tokens(work: Work, stores: dict[Split, StoreSize]) -> list[TokensPlan]:
    """The stores of all students whose `model` has other tokens than the teacher.

    Raises
        ColdstillError: the tokenizers cannot be aligned, or a store cannot be written in the
            tokens, as far as its sample shows
    """
    teacher = None
    found: dict[str, tuple[OwnTokens, Any, list[str]]] = {}
    for name, student in work.recipe.students.items():
        if student.model is None or folder_of(work, student.model) is None:
            continue
        teacher = teacher or teacher_tokens(work)
        if teacher is None:
            continue
        own = own_tokens(work, name, student, teacher[0].fingerprint)
        if own is not None:
            found.setdefault(own[0].key, (*own, []))[2].append(name)
    assert teacher is not None or not found
    return [
        _planned(work, own, tokenizer, names, stores, teacher[1] if teacher else None)
        for own, tokenizer, names in found.values()
    ]


def teacher_tokens(work: Work) -> tuple[TokenizerIdentity, Any] | None:
    """The teacher's tokens, and its tokenizer if it is not captured yet; None if its tokenizer does
    not exist yet or is not on this machine."""
    from ...stages.models.loading import load_tokenizer
    from ...stages.models.vocabulary import tokenizer_identity

    place = place_at(work.run.logits)
    if place.exists(MANIFEST):
        return read_manifest(place).tokenizer, None
    named = named_teacher(work)
    if named is not None and folder_of(work, named.model, named.revision) is not None:
        tokenizer = tokenizer_of_model(work, named)
    elif work.run.tokenizer.exists():
        tokenizer = load_tokenizer(str(work.run.tokenizer), "teacher.tokenizer")
    else:
        return None
    return tokenizer_identity(tokenizer), tokenizer


def _planned(
    work: Work,
    own: OwnTokens,
    tokenizer: Any,
    names: list[str],
    stores: dict[Split, StoreSize],
    teacher: Any,
) -> TokensPlan:
    from ...stages.student_tokens import expect_alignable, with_template_of

    where, note = f"students.{names[0]}", None
    if teacher is not None:
        expect_alignable(teacher, tokenizer, where)
        tokenizer = with_template_of(teacher, tokenizer, own.made("logits", 0), where)
    sizes: dict[Split, StoreSize] = {}
    seconds: dict[Split, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="coldstill-") as scratch:
        tokenizer.save_pretrained(scratch)
        for split, store in stores.items():
            folder = work.run.tokens / own.key / _FOLDERS[split]
            sizes[split] = made = _written(store, folder)
            if not made.sequences_missing:
                seconds[split] = 0.0
                continue
            sampled = None
            if store.sequences and not store.sequences_missing:
                sampled = _sampled(work, own, split, Path(scratch), where)
            seconds[split] = None if sampled is None else sampled.seconds * store.positions
            if sampled is not None:
                positions, width = sampled.positions, sampled.bytes_per_position
            else:
                positions, note = _share(work, split, Path(scratch), where)
                # a position inside a chunk has no distribution
                width = store.bytes_per_position * min(1.0, 1 / positions)
            count = round(store.positions * positions)
            left = made.sequences_missing / max(1, made.sequences)
            missing = round(count * width * left)
            sizes[split] = replace(
                made,
                positions=count,
                bytes_per_position=round(width, 1),
                measured=None if sampled is None else "sample",
                bytes=made.bytes + missing,
                bytes_missing=missing,
            )
            if (each := seconds[split]) is not None:
                seconds[split] = each * left
    known = [each for each in seconds.values() if each is not None]
    hours = sum(known) / 3600 if len(known) == len(stores) else None
    return TokensPlan(students=names, stores=sizes, hours=hours, note=note)


def _written(store: StoreSize, folder: Path) -> StoreSize:
    """What exists of a store in a student's tokens."""
    done = done_of(place_at(folder))
    return replace(
        store,
        positions=done.positions,
        counted=done.sequences == store.sequences > 0,
        bytes_per_position=round(done.bytes / max(1, done.positions), 1),
        measured="store",
        bytes=done.bytes,
        bytes_missing=0,
        sequences_missing=store.sequences - done.sequences,
        shards_done=done.shards,
        address=None,  # it is on this machine even if the teacher's store is not
        folder=folder,
    )


def _sampled(work: Work, own: OwnTokens, split: Split, folder: Path, where: str) -> Sampled:
    from ...data.maintenance.retokenize import sample

    place = place_at(work.run.logits if split == "train" else work.run.heldout)
    decisions = own.made(_FOLDERS[split], read_manifest(place).capture.tail)
    named = f"the tokenizer of {where}"
    return sample(str(place), folder, decisions, _SAMPLE_TOKENS, named=named)


def _share(work: Work, split: Split, folder: Path, where: str) -> tuple[float, str | None]:
    """Tokens of the student for each of the teacher, and what that lacks, in words."""
    try:
        ours, theirs = (tokens_in(work, split, one) for one in (folder, None))
    except ColdstillError as error:
        reason = str(error)
    else:
        if ours and theirs:
            return ours / theirs, None
        reason = "no document of the sample fits into a sequence in both tokenizers"
    return 1.0, f"{where}: as many tokens as the teacher has are assumed: {reason}"
