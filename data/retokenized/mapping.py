"""From the teacher's tokens to the student's: one table for probabilities, roles for specials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ColdstillError
from .beginnings import Beginnings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .spelling import Speller


@dataclass(frozen=True, slots=True, eq=False)
class TokenMap:
    """How the tokens of one tokenizer become those of another one."""

    first_V: NDArray[np.int32]
    """[V of the teacher] the student's first token for the bytes of each token; -1 if none."""
    ambiguous_V: NDArray[np.bool_]
    """[V of the teacher] whether the token may be the beginning of a longer token of the student:
    the teacher spells some token of the student with this token first."""
    specials: dict[int, tuple[int, ...]]
    """The student's tokens for each special token of the teacher that has some; empty if it is to
    be left out."""
    unreached: NDArray[np.int32]
    """[V of the student] its tokens, those that no token of the teacher maps to first, then those
    that few map to."""
    beginnings: Beginnings
    """How the teacher's tokens begin that the student spells with several of its own."""


MOST_SHARES = 64
"""Most tokens of the student that one token of the teacher is shared out among."""


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Which of the student's tokens an ambiguous token of the teacher begins, and how often.

    Counted in the texts of a store, at the borders that both tokenisations share: of the places
    where the teacher has this token, the share at which the student has each of its own. The
    student's token for its bytes counts half a place more than it was found. The 64 largest
    shares are kept.
    """

    offsets_V: NDArray[np.int64]
    """[V of the teacher + 1] token t has the entries `offsets[t]` to `offsets[t + 1]`; none if it
    is not ambiguous."""
    ids: NDArray[np.int64]
    """The student's tokens."""
    shares: NDArray[np.float64]
    """Their shares; those of a token sum to 1."""

    @classmethod
    def counted(cls, table: TokenMap, counts: Mapping[tuple[int, int], int]) -> Shares:
        """The shares of all ambiguous tokens that can be spelled.

        counts  how often the teacher has one token and the student another one at a shared border
        """
        ambiguous = np.flatnonzero(table.ambiguous_V & (table.first_V >= 0))
        found = {(int(t), int(table.first_V[t])): 0.5 for t in ambiguous}
        for (t, s), count in counts.items():
            if table.ambiguous_V[t] and table.first_V[t] >= 0:
                found[t, s] = found.get((t, s), 0.0) + count
        keys = np.array(sorted(found), np.int64).reshape(-1, 2)
        weights = np.array([found[t, s] for t, s in keys.tolist()])
        # the largest shares of each token
        order = np.lexsort((-weights, keys[:, 0]))
        firsts = np.searchsorted(keys[order, 0], keys[order, 0])
        kept = np.sort(order[np.arange(len(order)) - firsts < MOST_SHARES])
        keys, weights = keys[kept], weights[kept]
        lengths = np.bincount(keys[:, 0], minlength=len(table.first_V))
        sums = np.bincount(keys[:, 0], weights, minlength=len(table.first_V))
        offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
        return cls(offsets, keys[:, 1], weights / sums[keys[:, 0]])


def map_tokens(teacher: Speller, student: Speller, given: Mapping[str, str]) -> TokenMap:
    """The tables of two tokenizers.

    given  what the student reads for special tokens of the teacher, by their names

    Raises
        ColdstillError: a given name is not a special token of the teacher
    """
    specials = special_tokens(teacher, student, given)
    pieces: list[Sequence[int]] = [
        student.pieces(content) if content else specials.get(index, ())
        for index, content in enumerate(teacher.bytes_V)
    ]
    first_V = np.array([own[0] if own else -1 for own in pieces], np.int32)
    ambiguous_V = np.zeros(teacher.size, np.bool_)
    for content in student.bytes_V:
        index = teacher.first_token(content) if content else -1
        if index >= 0 and len(teacher.bytes_V[index] or b"") < len(content or b""):
            ambiguous_V[index] = True
    reached_V = np.bincount(first_V[first_V >= 0], minlength=student.size)
    return TokenMap(
        first_V=first_V,
        ambiguous_V=ambiguous_V,
        specials=specials,
        unreached=np.argsort(reached_V, kind="stable").astype(np.int32),
        beginnings=Beginnings(pieces, student.size),
    )


def relabelling(teacher: Speller, student: Speller) -> NDArray[np.int32] | None:
    """[V] the student's id of each token of the teacher, if the tokenizers differ in nothing but
    their ids; otherwise None. Unused ids are -1."""
    same_names = teacher.vocabulary.keys() == student.vocabulary.keys()
    if not same_names or teacher.size != student.size or teacher.shape() != student.shape():
        return None
    ids_V = np.full(teacher.size, -1, np.int32)
    for token, index in teacher.vocabulary.items():
        ids_V[index] = student.vocabulary[token]
    return ids_V


def special_tokens(
    teacher: Speller, student: Speller, given: Mapping[str, str]
) -> dict[int, tuple[int, ...]]:
    """`TokenMap.specials` of two tokenizers.

    By the given names first; then an end of text becomes the student's, and so does a begin of
    text; then a token of the same name; then other roles. A begin of text that the student lacks is
    left out.

    Raises
        ColdstillError: as `map_tokens`
    """
    found: dict[int, tuple[int, ...]] = {}
    for name in given:
        index = teacher.id_of(name)
        if index is None or not teacher.special_V[index]:
            raise ColdstillError(
                f"{teacher.where}: {name!r} is not one of its special tokens, for which "
                "something else could be written"
            )
    by_token: dict[str, list[str]] = {}
    for role, token in teacher.roles.items():
        by_token.setdefault(token, []).append(role)
    for index in np.flatnonzero(teacher.special_V).tolist():
        name = teacher.name_of(index)
        if name in given:
            found[index] = student.written(given[name])
            continue
        roles = by_token.get(name, [])
        ends = [role for role in ("eos_token", "bos_token") if role in roles]
        others = [role for role in roles if role not in (*ends, "unk_token")]
        ids = [student.id_of(student.roles.get(role)) for role in ends]
        same = student.id_of(name)
        is_special = same is not None and bool(student.special_V[same])
        ids += [same if is_special else None]
        ids += [student.id_of(student.roles.get(role)) for role in others]
        known = [each for each in ids if each is not None]
        if roles and set(roles) == {"unk_token"}:
            continue  # the text that it stands for is not known
        if known:
            found[index] = (known[0],)
        elif roles == ["bos_token"]:
            found[index] = ()
    return found
