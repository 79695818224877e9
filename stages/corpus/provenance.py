"""The settings and sources of a prepared corpus, and how they differ from the current ones."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.corpus.columns import Columns
from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.files import file_sha256
from ..models.vocabulary import tokenizer_identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...data.corpus.sources import Source
    from ...data.prepared import CorpusRecord
    from ..config import CorpusConfig

_FORMERLY = {"as_chat": False}
"""Values of keys that older records lack."""

_CLOCK_NS = 2_000_000_000
"""Resolution of the coarsest file system clock: changes within it may have the same time."""


def corpus_settings(config: CorpusConfig, tokenizer: Any) -> dict[str, Any]:
    """The settings that decide how a corpus is read, as its record stores them."""
    settings = asdict(config)
    settings["files"] = list(config.files)
    settings["tokenizer"] = tokenizer_identity(tokenizer).fingerprint
    template = str(tokenizer.chat_template or "")
    settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def source_listing(sources: Sequence[Source]) -> list[list[Any]]:
    """Name, bytes, time of change and SHA-256 of each source (empty for a data set on a hub)."""
    return [[s.name, s.bytes, _changed_ns(s), _digest(s)] for s in sources]


def expect_unchanged(sources: Sequence[Source], config: CorpusConfig, base: Path) -> None:
    """Check that no source was changed while it was read.

    Raises
        ColdstillError: a source differs from its listing, so it is unknown which version was read
    """
    now = {source.name: source for source in list_sources(config.files, base)}
    for source in sources:
        if now.get(source.name) != source:
            raise ColdstillError(
                f"{source.name}: was changed while the corpus was read; run the command again when "
                "nothing writes to it"
            )


def _changed_ns(source: Source) -> int:
    # `changed_ns` cannot be set back, so it shows that `modified_ns` was
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
    """The first difference that preparing the corpus again would make; None if there is none.

    Sources are compared by name, size and time of change. The content is read again only if the
    size is the same and the time differs, or is too close to `written_ns` to be trusted.

    written_ns  time at which the record was written
    """
    if record.prompts != prompts:
        if prompts:
            return "it holds texts to learn from, teacher.generate needs prompts"
        return "it holds prompts for teacher.generate, which the recipe no longer has"
    now = corpus_settings(config, tokenizer)
    for key, value in now.items():
        before = record.settings.get(key, _FORMERLY.get(key))
        if key == "columns" and isinstance(before, dict):  # older records lack newer columns
            before = {**asdict(Columns()), **before}
        if before == value or (key == "bad_rows" and not record.skipped):
            continue
        if key in ("tokenizer", "chat_template"):  # only their digests are known
            return f"the {key.replace('_', ' ')} has changed"
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
    """The fault of the labels of chats that version 0.1.0 prepared; None if there is none.

    That version learned the white space after each answer, and sometimes a header.
    """
    is_older = "as_chat" not in record.settings
    if not is_older or record.prompts or not tokenizer.chat_template:
        return None
    # in a plain text every token except the first of each piece is learned
    partly = any(
        split.positions < split.tokens - split.documents - split.sequences
        for split in record.splits.values()
    )
    if not partly:
        return None
    return (
        "prepared by an older version, which learned the white space after each answer of a chat "
        "and sometimes a header; give the run another name to prepare the corpus again"
    )


def _has_changed(source: Source, before: list[Any], written_ns: int) -> bool:
    size, changed_ns, digest = before
    settled = changed_ns < written_ns - _CLOCK_NS
    if settled and (source.bytes, _changed_ns(source)) == (size, changed_ns):
        return False
    # copies and checkouts change the time without changing the content
    return bool(source.bytes != size or _digest(source) != digest)
