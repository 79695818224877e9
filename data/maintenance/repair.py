"""Deletes damaged shards, so that `teacher-logits` makes them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..store.layout import SHARDS, commit_name, committed, shard_name
from . import Notify, quiet
from .shard import SequenceOrder, check_shard
from .verify import checked_manifest, stray_names, uncached

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..places.place import Place
    from ..store.manifest import Manifest
    from .shard import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair has done, or would do."""

    problems: list[Problem]
    dropped: list[int]
    """Indices of the damaged shards."""
    strays: list[str]
    """Names of the files that belong to no shard."""
    missing: int
    """How many shards `teacher-logits` has to make now."""


def repair(path: str, *, pretend: bool = False, notify: Notify = quiet) -> Repaired:
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
