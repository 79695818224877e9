"""The tokens of a student that has others than the teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import json_sha256, read_json

if TYPE_CHECKING:
    from ...data.maintenance.retokenize import Decisions
    from .run_folder import StudentFolder
    from .tables import StudentTable
    from .work import Work

TOKENS = "tokens"
"""Key of a student's settings; absent if it has the teacher's tokens."""


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """The tokens of a student that has others than the teacher, and what its recipe decides."""

    fingerprint: str
    """SHA-256 of its table of tokens and ids."""
    decisions: dict[str, Any]
    """The fields of `Decisions`; without `branches` if an earlier version recorded them, which drew
    none."""
    spelling: str
    """SHA-256 of the rest of its tokenizer: how it splits texts, what its special tokens are for,
    and its chat template. Models with the same tokens may differ in it."""

    @property
    def key(self) -> str:
        """Name of the folder of its stores."""
        known = [self.spelling] if self.spelling else []  # older records have none
        return json_sha256([self.fingerprint, self.decisions, *known])[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """What a student's settings record of it."""
        return asdict(self)

    def made(self, store: str, tail: int) -> Decisions:
        """The decisions for one store. Held-out records have samples, and samples have no bucket:
        there `split` takes its place. Nothing is learned from them, so they have no branches.

        store  name of the folder, `logits`, `heldout` or that of a further teacher
        tail   samples of the store
        """
        from ...data.maintenance.retokenize import Decisions

        found = Decisions(**{"branches": 0.0, **self.decisions})
        if store == "heldout":
            found = replace(found, branches=0.0)
        in_bucket = found.ambiguous == "bucket" and tail and store == "heldout"
        return replace(found, ambiguous="split") if in_bucket else found

    @classmethod
    def recorded(cls, folder: StudentFolder) -> OwnTokens | None:
        """Those of a trained student; None if it has the teacher's tokens."""
        match read_json(folder.settings).get(TOKENS):
            case {"fingerprint": str(fingerprint), "decisions": dict() as decisions, **others}:
                return cls(fingerprint, decisions, str(others.get("spelling", "")))
        return None


def own_tokens(
    work: Work, name: str, student: StudentTable, teacher: str
) -> tuple[OwnTokens, Any] | None:
    """The tokens of a student whose `model` has others than the teacher, and its tokenizer; None
    for other students.

    teacher  fingerprint of the teacher's tokens

    Raises
        ColdstillError: the tokenizer is missing, a token that texts need has no row, or the recipe
            asks for what such a student cannot have
    """
    if student.model is None:
        return None
    from ...stages.config import RetokenizeConfig
    from ...stages.models.vocabulary import tokenizer_identity
    from ...stages.student_tokens import spelling_sha256, tokenizer_of

    where = f"students.{name}.model"
    loaded = tokenizer_of(work.local(student.model), where, own_code=student.trust_remote_code)
    fingerprint = tokenizer_identity(loaded).fingerprint
    if fingerprint == teacher:
        return None
    if student.rounds is not None:
        raise ColdstillError(
            f"students.{name}.rounds: its tokens are not the teacher's, so the teacher cannot "
            "score its text; remove 'rounds', or take a student with the teacher's tokens"
        )
    config = student.retokenize or RetokenizeConfig()
    if config.ambiguous == "bucket" and work.recipe.logits.tail:
        raise ColdstillError(
            f"students.{name}.retokenize: ambiguous = bucket needs a record without samples, which "
            "alone has a bucket: set logits.tail = 0 and a head, or ambiguous = split"
        )
    decisions = asdict(config)
    if "branches" not in student.objective.weights and _drew_none(work.run.student(name)):
        del decisions["branches"]  # so that its store stays the one that it is trained from
    return OwnTokens(fingerprint, decisions, spelling_sha256(loaded)), loaded


def _drew_none(folder: StudentFolder) -> bool:
    """Whether an earlier version, whose stores have no branches, began to train a student."""
    recorded = OwnTokens.recorded(folder) if folder.settings.exists() else None
    return recorded is not None and "branches" not in recorded.decisions
