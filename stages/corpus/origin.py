"""What a prepared corpus was made from, and what of that is different now."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.corpus import Columns, list_sources
from ...data.errors import ColdstillError
from ...data.fingerprint import file_sha256
from ..models.vocabulary import tokenizer_identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...data.corpus import Source
    from ...data.prepared import CorpusRecord
    from ..config import CorpusConfig

_FORMERLY = {"as_chat": False}
"""What corpora were prepared with before there was this key."""

_CLOCK_NS = 2_000_000_000
"""The coarsest clock of a file system: two changes within it may bear the same time."""


def corpus_settings(config: CorpusConfig, tokenizer: Any) -> dict[str, Any]:
    """What decides how a corpus is read, as its record keeps it."""
    settings = asdict(config)
    settings["files"] = list(config.files)
    settings["tokenizer"] = tokenizer_identity(tokenizer).fingerprint
    template = str(tokenizer.chat_template or "")
    settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def source_listing(sources: Sequence[Source]) -> list[list[Any]]:
    """Each source's name, bytes, time of change and SHA-256; the last is empty for what only a
    hub has."""
    return [[s.name, s.bytes, _changed_ns(s), _digest(s)] for s in sources]


def expect_unchanged(sources: Sequence[Source], config: CorpusConfig, base: Path) -> None:
    """Raise ColdstillError if a source is no longer what it was when it was listed: then nobody
    knows which of both was read."""
    now = {source.name: source for source in list_sources(config.files, base)}
    for source in sources:
        if now.get(source.name) != source:
            raise ColdstillError(
                f"{source.name}: was changed while the corpus was read; run the command again once "
                "nobody writes to it"
            )


def _changed_ns(source: Source) -> int:
    # whoever sets the time of a change back is found out by the time at which that was done
    return max(source.modified_ns, source.changed_ns)


def _digest(source: Source) -> str:
    return "" if source.path is None or source.path.is_dir() else file_sha256(source.path)


def difference_in_corpus(
    record: CorpusRecord,
    config: CorpusConfig,
    base: Path,
    tokenizer: Any,
    *,
    prompts: bool = False,
    written_ns: int = 0,
) -> str | None:
    """What preparing the corpus again would do differently, or None.

    Sources are compared by name, size and time of change; the content of one is read again only
    where its size has stayed and its time has not, or may only seem to have.

    written_ns  when the record was written: the time of a file that was changed just before tells
                nothing of a change just after
    """
    if record.prompts != prompts:
        if prompts:
            return "it holds texts to learn from, teacher.generate needs prompts"
        return "it holds prompts for teacher.generate, which the recipe no longer has"
    now = corpus_settings(config, tokenizer)
    for key, value in now.items():
        before = record.settings.get(key, _FORMERLY.get(key))
        if key == "columns" and isinstance(before, dict):  # which may lack the newest of its keys
            before = {**asdict(Columns()), **before}
        if before == value or (key == "bad_rows" and not record.skipped):
            continue
        if key in ("tokenizer", "chat_template"):  # known by their digests
            return f"the {key.replace('_', ' ')} is another"
        return f"corpus.{key} was {before!r}, is {value!r}"
    old = {str(name): rest for name, *rest in record.sources}
    new = {source.name: source for source in list_sources(config.files, base)}
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            return f"the file {name} is new"
        if name not in new:
            return f"the file {name} is gone"
        if _has_changed(new[name], old[name], written_ns):
            return f"the file {name} has changed"
    return None


def outdated_labels(record: CorpusRecord, tokenizer: Any) -> str | None:
    """What is wrong with the labels of a corpus that version 0.1.0 prepared from chats, as a
    sentence; None if nothing is.

    That version learned the white space after each answer, and sometimes a header.
    """
    is_older = "as_chat" not in record.settings
    if not is_older or record.prompts or not tokenizer.chat_template:
        return None
    # of a plain text every token is learned but the first one of each piece
    partly = any(
        split.positions < split.tokens - split.documents - split.sequences
        for split in record.splits.values()
    )
    if not partly:
        return None
    return (
        "prepared by an older version, which learned the white space after each answer of a chat "
        "and sometimes a header; give the run another name to prepare the corpus anew"
    )


def _has_changed(source: Source, before: list[Any], written_ns: int) -> bool:
    size, changed_ns, digest = before
    settled = changed_ns < written_ns - _CLOCK_NS
    if settled and (source.bytes, _changed_ns(source)) == (size, changed_ns):
        return False
    # a copy or a checkout touches files without changing them
    return bool(source.bytes != size or _digest(source) != digest)
