"""Checks every byte and record of a store, and every rule of its format; deletes damaged shards."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, file_sha256, json_bytes, tokens_sha256
from ..places.cache import CacheSettings
from ..places.local import LocalPlace
from ..places.place import place_at
from ..store.commit import parse_files
from ..store.layout import (
    MANIFEST,
    SHARDS,
    TOKENIZER,
    TOKENIZER_FILES,
    commit_name,
    committed,
    shard_name,
)
from ..store.manifest import Manifest, parse_manifest
from . import Notify, no_progress
from .shard import Problem, SequenceOrder, check_shard, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..places.place import Place

_NAMED_GAPS = 20
"""Number of missing shards that are named one by one after the last existing one. A damaged
manifest may promise any number."""


def verify(path: str, notify: Notify = no_progress) -> Iterator[Problem]:
    """All faults of a store, shard by shard. Raises ColdstillError if the store does not exist."""
    with uncached(path) as (place, forget):
        try:
            manifest = checked_manifest(place)
        except ColdstillError as error:
            yield Problem(what=str(error))
            return
        yield from _tokenizer(place, manifest)
        yield from _shards(place, manifest, notify, forget)


@contextlib.contextmanager
def uncached(path: str) -> Iterator[tuple[Place, Callable[[], None]]]:
    """The place of a store without the usual cache, and a function that deletes fetched copies.

    A whole copy in the usual cache would hide that the object was damaged later. Copies go to a
    temporary folder; with a call after each shard it holds one shard at a time.

    Raises
        ColdstillError: the place has no manifest
    """
    place = place_at(path)
    if not place.exists(MANIFEST):
        raise ColdstillError(f"{place}: no manifest.json there, so not a store")
    if isinstance(place, LocalPlace):
        yield place, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:

        def forget() -> None:
            for entry in Path(folder).iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)

        yield place_at(path, CacheSettings(folder=Path(folder), bytes=1 << 62)), forget


def checked_manifest(place: Place) -> Manifest:
    """The manifest, compared byte for byte; raises ColdstillError if it is damaged."""
    content = place.read(MANIFEST)
    manifest = parse_manifest(content, place.path(MANIFEST))
    if content != json_bytes(manifest.to_json()):
        raise ColdstillError(f"{place.path(MANIFEST)}: damaged: not the bytes that were written")
    codec = manifest.make_codec(place)
    promised = getattr(codec, "vocabulary", manifest.tokenizer.size)
    if promised != manifest.tokenizer.size:
        raise ColdstillError(
            f"{place.path(MANIFEST)}: its codec is for {promised:,} tokens, its tokenizer has "
            f"{manifest.tokenizer.size:,}"
        )
    return manifest


def stray_names(manifest: Manifest, names: set[str]) -> list[str]:
    """The names among the shards that belong to no shard, without leftovers of a crash."""
    suffix = manifest.make_store("store").suffix
    ours = set()
    for index in committed(names):
        if index < manifest.shards:
            ours |= {_name(commit_name(index)), _name(shard_name(index, suffix))}
    return sorted(name for name in names - ours if not name.startswith(SCRATCH_PREFIX))


def leftovers(path: str) -> list[str]:
    """Files of interrupted writes: they do no harm, and the next writer deletes them."""
    place = place_at(path)
    inside = [(".", ""), (SHARDS, f"{SHARDS}/")]
    found = {f"{under}{name}" for folder, under in inside for name in place.names(folder)}
    return sorted(place.path(name) for name in found if _name(name).startswith(SCRATCH_PREFIX))


def _shards(
    place: Place, manifest: Manifest, notify: Notify, forget: Callable[[], None]
) -> Iterator[Problem]:
    names = place.names(SHARDS)
    for stray in stray_names(manifest, names):
        yield Problem(what=f"{place.path(f'{SHARDS}/{stray}')}: belongs to no shard")
    done = set(committed(names))
    after_last = max(done, default=-1) + 1
    order = SequenceOrder(manifest)
    for index in range(manifest.shards):
        if index in done:
            yield from check_shard(place, manifest, index, order)
            forget()
        elif index < after_last + _NAMED_GAPS:
            yield Problem(what="missing", shard=index, missing=True)
        else:
            gap = f"missing, and so are the {manifest.shards - index - 1} after it"
            yield Problem(what=gap, shard=index, missing=True)
            return
        notify("verify", manifest.shard_rows(index).stop, manifest.sequences)


def _tokenizer(place: Place, manifest: Manifest) -> Iterator[Problem]:
    names = place.names(TOKENIZER)
    yield from _tokenizer_files(place)
    if "tokenizer.json" not in names:
        if names or not manifest.tokenizer.fingerprint:
            return  # its tokenizer has no such file, or the store was made without one
        what = f"{place.path(TOKENIZER)}: missing; its ids can no longer be read as text"
        yield Problem(what=what)
        return
    from tokenizers import Tokenizer

    try:
        file = place.folder(TOKENIZER) / "tokenizer.json"
        table = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare exceptions
        yield Problem(what=f"{place.path(TOKENIZER)}: {one_line(error)}")
        return
    if tokens_sha256(table) != manifest.tokenizer.fingerprint:
        yield Problem(what=f"{place.path(TOKENIZER)}: not the tokenizer that the manifest names")


def _tokenizer_files(place: Place) -> Iterator[Problem]:
    """Faults of the tokenizer's files, if the store has a record of them."""
    try:
        files = parse_files(place.read(TOKENIZER_FILES), place.path(TOKENIZER_FILES))
        folder = place.folder(TOKENIZER)
        for file in files:
            path = folder / file.name
            if not path.is_file() or file_sha256(path) != file.sha256:
                what = f"{place.path(f'{TOKENIZER}/{file.name}')}: damaged: not what was written"
                yield Problem(what=what)
    except FileNotFoundError:
        return
    except (ColdstillError, OSError) as error:
        yield Problem(what=one_line(error))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """The result of a repair, or of a dry run."""

    problems: list[Problem]
    dropped: list[int]
    """Indices of the damaged shards."""
    strays: list[str]
    """Names of the files that belong to no shard."""
    missing: int
    """Number of shards that `teacher-logits` has to make now."""


def repair(path: str, *, pretend: bool = False, notify: Notify = no_progress) -> Repaired:
    """Check every shard and delete each damaged one, commit record first.

    pretend  delete nothing

    Raises
        ColdstillError: the store does not exist, its manifest is damaged, another process writes
            it, or a shard cannot be read now; nothing is deleted then
    """
    with uncached(path) as (place, forget):
        try:
            manifest = checked_manifest(place)
        except ColdstillError as error:
            raise ColdstillError(
                f"{error}; a manifest cannot be repaired: restore it from a copy, or move the "
                "store away and make a new one"
            ) from error
        if pretend:
            return _repair(place, manifest, pretend, notify, forget)
        with place.lock():
            place.clear()
            return _repair(place, manifest, pretend, notify, forget)


def _repair(
    place: Place, manifest: Manifest, pretend: bool, notify: Notify, forget: Callable[[], None]
) -> Repaired:
    names = place.names(SHARDS)
    done = [index for index in committed(names) if index < manifest.shards]
    problems: list[Problem] = []
    dropped = []
    order = SequenceOrder(manifest)
    for index in done:
        found = check_shard(place, manifest, index, order)
        forget()
        problems += found
        if found:
            dropped.append(index)
            if not pretend:
                _drop(place, manifest, index)
        notify("repair", manifest.shard_rows(index).stop, manifest.sequences)
    strays = stray_names(manifest, names)
    for stray in strays if not pretend else ():
        place.remove(f"{SHARDS}/{stray}")
    missing = manifest.shards - len(done) + len(dropped)
    return Repaired(problems=problems, dropped=dropped, strays=strays, missing=missing)


def _drop(place: Place, manifest: Manifest, index: int) -> None:
    # The record first: if this is interrupted, the data that is left is a stray file.
    place.remove(commit_name(index))
    place.remove(shard_name(index, manifest.make_store(place).suffix))
