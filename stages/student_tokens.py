"""A store in the tokens of a student: loads the student's tokenizer and writes the store again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import json_sha256
from ..data.maintenance import Notify, no_progress
from ..data.maintenance.retokenize import Decisions, retokenize
from ..data.retokenized.spelling import Speller
from ..data.store.layout import TOKENIZER
from ..data.store.reader import open_store
from .models.loading import load_config, load_tokenizer
from .models.vocabulary import tokenizer_identity, vocabulary_rows, without_rowless
from .student_chat import expect_counterparts, template_for, translated

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data.store.manifest import Manifest
    from .student_chat import GivenTemplate


def tokenizer_of(name: str, where: str, *, own_code: bool = False) -> Any:
    """The tokenizer of a model, or of a folder that holds nothing else.

    Added tokens for which the model has no row are left out.

    Raises
        ColdstillError: the tokenizer is missing, or a token that texts need has no row
    """
    tokenizer = load_tokenizer(name, where, own_code=own_code)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return tokenizer
    rows = vocabulary_rows(load_config(name, where, own_code=own_code))
    return without_rowless(tokenizer, rows, where)


def spelling_sha256(tokenizer: Any) -> str:
    """SHA-256 of what decides a store in its tokens, beside its table of tokens and ids: how it
    splits texts, the purposes of its special tokens, and its chat template."""
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {key: value for key, value in table.items() if key not in ("padding", "truncation")}
    return json_sha256([rest, tokenizer.special_tokens_map, tokenizer.chat_template])


def retokenize_for(
    path: str,
    to: str,
    tokenizer: Any,
    decisions: Decisions,
    named: str,
    notify: Notify = no_progress,
    tell: Callable[[GivenTemplate], None] = lambda given: None,
) -> Manifest:
    """Write a store in the tokens of a loaded tokenizer; parameters and errors as `retokenize`.

    tell  called with what becomes of its chat template, if the store has chats
    """
    source, own = open_store(path), tokenizer.chat_template
    identity = tokenizer_identity(tokenizer)
    with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
        tokenizer.save_pretrained(folder)
        given = None
        if source.place.exists(TOKENIZER) and identity != source.manifest.tokenizer:
            given = template_for(source, tokenizer, Path(folder), decisions, named)
        if given is not None and given.template != own:
            tokenizer.chat_template = given.template
            tokenizer.save_pretrained(folder)
            tokenizer.chat_template = own
        manifest = retokenize(path, to, Path(folder), decisions, named=named, notify=notify)
    if given is not None:
        tell(given)
    return manifest


def expect_alignable(
    teacher: Any, student: Any, where: str, decisions: Decisions | None = None
) -> None:
    """Refuse two tokenizers with other tokens that cannot be aligned.

    where      the student's key in messages
    decisions  of a student of chats: special tokens of the teacher's chat template are looked for

    Raises
        ColdstillError: the bytes of a tokenizer's tokens cannot be known, or a special token lacks
            a counterpart
    """
    if tokenizer_identity(teacher).fingerprint == tokenizer_identity(student).fingerprint:
        return
    ours, theirs = _spellers(teacher, student, where)
    if decisions is not None and teacher.chat_template:
        expect_counterparts(teacher, ours, theirs, decisions, where)


def _spellers(teacher: Any, student: Any, where: str) -> tuple[Speller, Speller]:
    found = []
    for tokenizer, named in ((teacher, "the teacher's tokenizer"), (student, "its tokenizer")):
        with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
            tokenizer.save_pretrained(folder)
            found.append(Speller(Path(folder), f"{where}: {named}"))
    return found[0], found[1]


def with_template_of(teacher: Any, student: Any, decisions: Decisions, where: str) -> Any:
    """A student's tokenizer, with the teacher's chat template in its tokens if there is one."""
    if teacher.chat_template:
        ours, theirs = _spellers(teacher, student, where)
        student.chat_template = translated(teacher, ours, student, theirs, decisions).template
    return student


def special_texts(pairs: tuple[str, ...], where: str) -> dict[str, str]:
    """What is written for special tokens, from pairs such as `<|im_end|>=</s>`.

    The name of a token may hold `=`: the last one separates. Raises ColdstillError for a pair
    without it.
    """
    found = {}
    for pair in pairs:
        token, mark, text = pair.rpartition("=")
        if not mark or not token:
            raise ColdstillError(
                f"{where}: {json.dumps(pair)}: expected a pair such as '<|im_end|>=</s>'"
            )
        found[token] = text
    return found
