"""Is a store what it says it is? Every byte, every record, every rule of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, json_bytes
from ..fingerprint import file_sha256, tokens_sha256
from ..places.opening import place_at
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
from . import Tell, quiet
from .problem import Problem, one_line
from .sequence_order import SequenceOrder
from .shard import check_shard
from .uncached import uncached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..places.place import Place


def verify(path: str, tell: Tell = quiet) -> Iterator[Problem]:
    """Everything that is wrong with a store, shard by shard.

    Raises
        ColdstillError: there is no store
    """
    with uncached(path) as (place, forget):
        try:
            manifest = checked_manifest(place)
        except FileNotFoundError as error:
            raise ColdstillError(f"{place}: no manifest.json there, so not a store") from error
        except ColdstillError as error:
            yield Problem(what=str(error))
            return
        yield from _tokenizer(place, manifest)
        yield from _shards(place, manifest, tell, forget)


def _shards(
    place: Place, manifest: Manifest, tell: Tell, forget: Callable[[], None]
) -> Iterator[Problem]:
    names = place.names(SHARDS)
    for stray in stray_names(manifest, names):
        yield Problem(what=f"{place.path(f'{SHARDS}/{stray}')}: belongs to no shard")
    done = set(committed(names))
    order = SequenceOrder(manifest)
    for index in range(manifest.shards):
        if index in done:
            yield from check_shard(place, manifest, index, order)
            forget()
        elif index < _last(done) + _NAMED_GAPS:
            yield Problem(what="not there", shard=index, missing=True)
        else:
            gap = f"not there, nor the {manifest.shards - index - 1} after it"
            yield Problem(what=gap, shard=index, missing=True)
            return
        tell("verify", manifest.shard_rows(index).stop, manifest.sequences)


_NAMED_GAPS = 20
"""So many missing shards are named one by one after the last that is there: a damaged promise may
be of any number."""


def _last(done: set[int]) -> int:
    return max(done, default=-1) + 1


def checked_manifest(place: Place) -> Manifest:
    """The manifest, byte for byte as it was written; raises ColdstillError otherwise."""
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
    """What lies among the shards and belongs to none; leftovers of a crash are not counted."""
    suffix = manifest.make_store("store").suffix
    ours = set()
    for index in committed(names):
        if index < manifest.shards:
            ours |= {_name(commit_name(index)), _name(shard_name(index, suffix))}
    return sorted(name for name in names - ours if not name.startswith(SCRATCH_PREFIX))


def leftovers(path: str) -> list[str]:
    """What interrupted writes left behind: it does no harm, and the next writer clears it away."""
    place = place_at(path)
    inside = [(".", ""), (SHARDS, f"{SHARDS}/")]
    found = {f"{under}{name}" for folder, under in inside for name in place.names(folder)}
    return sorted(place.path(name) for name in found if _name(name).startswith(SCRATCH_PREFIX))


def _tokenizer(place: Place, manifest: Manifest) -> Iterator[Problem]:
    names = place.names(TOKENIZER)
    yield from _tokenizer_files(place)
    if "tokenizer.json" not in names:
        if names or not manifest.tokenizer.fingerprint:
            return  # a kind without a table in a file, or a store made without a tokenizer
        what = f"{place.path(TOKENIZER)}: not there; its ids can no longer be read as text"
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
        what = f"{place.path(TOKENIZER)}: not the tokenizer that the manifest names"
        yield Problem(what=what)


def _tokenizer_files(place: Place) -> Iterator[Problem]:
    """Every byte of it, where the store has a record of them."""
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
