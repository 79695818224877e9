"""A store in the tokens of a student: loads the student's tokenizer and writes the store again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.maintenance import Notify, no_progress
from ..data.maintenance.retokenize import Decisions, retokenize
from ..data.retokenized.spelling import Speller
from .models.loading import load_config, load_tokenizer
from .models.vocabulary import tokenizer_identity, vocabulary_rows, without_rowless

if TYPE_CHECKING:
    from ..data.store.manifest import Manifest


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


def retokenize_for(
    path: str,
    to: str,
    tokenizer: Any,
    decisions: Decisions,
    named: str,
    notify: Notify = no_progress,
) -> Manifest:
    """Write a store in the tokens of a loaded tokenizer; parameters and errors as `retokenize`."""
    with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
        tokenizer.save_pretrained(folder)
        return retokenize(path, to, Path(folder), decisions, named=named, notify=notify)


def expect_alignable(teacher: Any, student: Any, where: str) -> None:
    """Refuse two tokenizers with other tokens if the bytes of their tokens cannot be known.

    where  the student's key in messages

    Raises
        ColdstillError: which of them, and why
    """
    if tokenizer_identity(teacher).fingerprint == tokenizer_identity(student).fingerprint:
        return
    for tokenizer, named in ((teacher, "the teacher's tokenizer"), (student, "its tokenizer")):
        with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
            tokenizer.save_pretrained(folder)
            Speller(Path(folder), f"{where}: {named}")


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
