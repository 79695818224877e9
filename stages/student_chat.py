"""The chat template of a student with other tokens: the teacher's, in the student's tokens.

A store of chats holds them as the teacher's chat template writes them, and so the student learns
them. Its own template would write them otherwise. What the new template writes is tokenised by the
student's tokenizer and compared with what a store would hold.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.errors import ColdstillError
from ..data.prepared import TokenizedDocument, build_sequences
from ..data.retokenized.beginnings import Beginnings
from ..data.retokenized.documents import Rewriter
from ..data.retokenized.mapping import TokenMap, special_tokens
from ..data.retokenized.spelling import Speller
from .corpus.chat_template import Chat, ChatTemplate
from .models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ..data.maintenance.retokenize import Decisions
    from ..data.schema import Sequences
    from ..data.store.reader import StoreReader

_SEQUENCES = 64
"""Sequences of a store that are searched for chats, evenly spaced."""
_QUESTION, _ANSWER = "What is 12?", " It is\n12. "
_ROLES = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant"),
    ("system", "user", "assistant"),
)  # fmt: skip
"""Roles of the chats that are tried; a template may refuse some."""


@dataclass(frozen=True, slots=True)
class GivenTemplate:
    """What becomes of a student's chat template."""

    template: Any
    """As `chat_template` of a tokenizer."""
    note: str
    """What the user is told."""
    warning: bool = False


def template_for(
    store: StoreReader, tokenizer: Any, folder: Path, decisions: Decisions, named: str
) -> GivenTemplate | None:
    """The chat template of a student that learns from a store in its own tokens; None if the store
    has no chats, so that the student keeps its own.

    tokenizer  the student's
    folder     with its files
    named      its name in messages

    Raises
        ColdstillError: the bytes of a tokenizer's tokens cannot be known
    """
    teacher = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    sequences = _some(store)
    if not teacher.chat_template or not _has_prompts(sequences):
        return None
    opener = _opener(ChatTemplate(teacher))
    if not opener:
        note = (
            f"whether the store has chats is not known, because the teacher's chat template does "
            f"not write a small one; {named} keeps its own"
        )
        return GivenTemplate(tokenizer.chat_template, note, warning=True)
    if not _has_chats(sequences, teacher, opener):
        return None
    ours = Speller(store.tokenizer_folder(), f"the tokenizer of {store.place}")
    return translated(teacher, ours, tokenizer, Speller(folder, named), decisions)


def translated(
    teacher: Any, ours: Speller, tokenizer: Any, theirs: Speller, decisions: Decisions
) -> GivenTemplate:
    """The teacher's chat template in the tokens of a student.

    teacher, tokenizer  those of teacher and student
    ours, theirs        the same, by their bytes
    """
    own, named = tokenizer.chat_template, theirs.where
    specials = special_tokens(ours, theirs, decisions.special)
    names = {ours.name_of(one): "".join(map(theirs.name_of, ids)) for one, ids in specials.items()}
    begin = "" if ours.prefix() else "".join(map(theirs.name_of, theirs.prefix()))
    rewriter = Rewriter(ours, theirs, _only(specials), skip=True)
    faults: dict[str, Any] = {}
    try:
        for change in (_renamed, _replaced):
            templates = _by_name(teacher.chat_template)
            changed = {name: begin + change(t, names, teacher) for name, t in templates.items()}
            template = changed if isinstance(teacher.chat_template, dict) else changed[""]
            tokenizer.chat_template = template
            fault = _first_fault(teacher, tokenizer, rewriter)
            if fault is None:
                note = (
                    f"the store has chats, so {named} now has the chat template of the teacher, "
                    "with special tokens of its own"
                )
                return GivenTemplate(template, note)
            faults.setdefault(fault, template)
    finally:
        tokenizer.chat_template = own
    fault, template = list(faults.items())[-1]
    note = (
        f"the store has chats, so {named} now has the chat template of the teacher, but what it "
        f"writes is not quite what is learned: {fault}"
    )
    return GivenTemplate(template, note, warning=True)


def expect_counterparts(
    teacher: Any, ours: Speller, theirs: Speller, decisions: Decisions, where: str
) -> None:
    """Refuse a student that lacks a special token which the teacher's chat template writes.

    where  the student's key in messages

    Raises
        ColdstillError: all such tokens, and what to set
    """
    specials = special_tokens(ours, theirs, decisions.special)
    missing: dict[str, None] = {}
    for chat, prompt in _chats():
        try:
            text = ChatTemplate(teacher).write(chat, prompt=prompt)[0]
        except Exception:  # a template may refuse a chat
            continue
        ids = teacher.backend_tokenizer.encode(text, add_special_tokens=False).ids
        missing |= {ours.name_of(i): None for i in ids if ours.special_V[i] and i not in specials}
    if missing:
        given = ", ".join(f"{json.dumps(name)} = TEXT" for name in missing)
        raise ColdstillError(
            f"{where}.retokenize: the teacher's chat template writes {', '.join(missing)}, and the "
            f"student's tokenizer has nothing for it; say what to write: special = {{ {given} }}"
        )


def _by_name(template: str | dict[str, str]) -> dict[str, str]:
    """Templates by name; a single one has none."""
    return template if isinstance(template, dict) else {"": template}


def _some(store: StoreReader) -> Sequences:
    count = min(len(store), _SEQUENCES)
    return store.read(np.unique(np.linspace(0, len(store) - 1, count).astype(np.int64))).sequences


def _has_prompts(sequences: Sequences) -> bool:
    """Whether some document begins with tokens that are not learned."""
    rows = zip(sequences.document_starts, sequences.positions, strict=True)
    return any(not np.isin(starts_D, positions_M).all() for starts_D, positions_M in rows)


def _has_chats(sequences: Sequences, teacher: Any, opener: str) -> bool:
    """Whether some text asks as the chat template does."""
    ids = np.array(teacher.backend_tokenizer.encode(opener, add_special_tokens=False).ids)
    for tokens_T in sequences.tokens:
        places = np.flatnonzero(tokens_T[: len(tokens_T) - len(ids) + 1] == ids[0])
        if any((tokens_T[place : place + len(ids)] == ids).all() for place in places):
            return True
        if opener in teacher.decode(tokens_T.tolist(), skip_special_tokens=False):
            return True
    return False


def _opener(template: ChatTemplate) -> str:
    """The text between a question and its answer, as far as a generation prompt has it too; empty
    if the template does not write such a chat."""
    system, question, answer = (
        {"role": role, "content": text}
        for role, text in (("system", "-"), ("user", _QUESTION), ("assistant", _ANSWER.strip()))
    )
    for before in ((question,), (system, question)):  # some templates want a system's message
        try:
            asked = template.write(Chat(before), prompt=True)[0]
            text = template.write(Chat((*before, answer)))[0]
        except Exception:  # templates raise any class
            continue
        asked = asked.rpartition(_QUESTION)[2].strip()
        between = text.rpartition(_QUESTION)[2].partition(answer["content"])[0].strip()
        # either may go on with thoughts
        return asked if between.startswith(asked) else between
    return ""


def _only(specials: dict[int, tuple[int, ...]]) -> TokenMap:
    """A table that maps special tokens only."""
    none = np.zeros(0, np.int32)
    return TokenMap(none, none.astype(np.bool_), specials, none, Beginnings([], 0))


def _renamed(text: str, names: Mapping[str, str], teacher: Any) -> str:
    """The template with other names in it."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    roles = _roles(text, {name: names.get(name, name) for name in _of_roles(teacher)}, teacher)
    return roles + (re.sub(pattern, lambda found: names[found[0]], text) if names else text)


def _replaced(text: str, names: Mapping[str, str], teacher: Any) -> str:
    """A template that replaces the names in what the teacher's writes, which may put them
    together."""
    steps = "".join(
        f" | replace({json.dumps(name)}, {json.dumps(new)})"
        for name, new in names.items()
        if name != new
    )
    roles = _roles(text, {name: name for name in _of_roles(teacher)}, teacher)
    whole = text.removesuffix("\n")  # as jinja does at the end of a template
    return f"{roles}{{% set teachers_text %}}{whole}{{% endset %}}{{{{ teachers_text{steps} }}}}"


def _of_roles(teacher: Any) -> list[str]:
    """The teacher's tokens that a template may name by their roles."""
    return [name for name in teacher.special_tokens_map.values() if isinstance(name, str)]


def _roles(text: str, names: Mapping[str, str], teacher: Any) -> str:
    """Sets the variables of roles that a template names."""
    return "".join(
        f"{{% set {role} = {json.dumps(names[name])} %}}"
        for role, name in teacher.special_tokens_map.items()
        if name in names and re.search(rf"\b{role}\b", text)
    )


def _first_fault(teacher: Any, student: Any, rewriter: Rewriter) -> str | None:
    """How the student's template differs from what a store has of a chat; None if it does not."""
    tried = False
    for chat, prompt in _chats():
        try:
            text = ChatTemplate(teacher).write(chat, prompt=prompt)[0]
        except Exception:  # a template may refuse a chat
            continue
        try:
            own = ChatTemplate(student).write(chat, prompt=prompt)[0]
        except Exception as error:
            return f"it cannot be written: {' '.join(str(error).split()):.80}"
        tried = True
        ids = teacher.backend_tokenizer.encode(text, add_special_tokens=False).ids
        document = TokenizedDocument(0, np.array(ids, np.int32), np.zeros(len(ids), np.bool_))
        none = np.zeros(0, np.float32)
        try:
            made = rewriter(build_sequences(0, [[document]]), none, none.astype(np.bool_))
        except ColdstillError as error:  # a special token that the store need not have
            return str(error)
        expected = made.sequences.tokens[0].tolist()
        found = student.backend_tokenizer.encode(own, add_special_tokens=False).ids
        if found != expected:
            pairs = zip([*found, None], [*expected, None], strict=False)
            at = next(place for place, (a, b) in enumerate(pairs) if a != b)
            shown = (
                " ".join(map(repr, student.convert_ids_to_tokens(ids[at : at + 3]))) or "nothing"
                for ids in (found, expected)
            )
            return "it gives {} instead of {}".format(*shown)
    return None if tried else "it writes none of the chats that were tried"


def _chats() -> Iterator[tuple[Chat, bool]]:
    """Small chats, and whether to end with the generation prompt."""
    texts = {"system": "Be brief.", "user": _QUESTION, "assistant": _ANSWER}
    for roles in _ROLES:
        messages = tuple({"role": role, "content": texts[role]} for role in roles)
        yield Chat(messages), roles[-1] == "user"
