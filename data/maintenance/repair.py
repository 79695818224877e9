"""Drops what is damaged, so that stage one can fill the gap. Never invents anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..store.layout import SHARDS, commit_name, committed, shard_name
from . import Tell, quiet
from .sequence_order import SequenceOrder
from .shard import check_shard
from .uncached import uncached
from .verify import checked_manifest, stray_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..places.place import Place
    from ..store.manifest import Manifest
    from .problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair did, or would do."""

    problems: list[Problem]
    dropped: list[int]
    """Shards that were damaged."""
    strays: list[str]
    """Files that belonged to no shard."""
    missing: int
    """Shards that stage one has to make now."""


def repair(path: str, *, pretend: bool = False, tell: Tell = quiet) -> Repaired:
    """Check every shard and delete each damaged one, commit record first.

    pretend  only say what would be done

    Raises
        ColdstillError: no store, a damaged manifest (nothing is touched), or another writer; or a
            shard that cannot be read now, which is no reason to delete it
    """
    with uncached(path) as (place, forget):
        try:
            manifest = checked_manifest(place)
        except FileNotFoundError as error:
            raise ColdstillError(f"{place}: no manifest.json there, so not a store") from error
        except ColdstillError as error:
            raise ColdstillError(
                f"{error}; a manifest cannot be repaired: bring it back from a copy, or move the "
                "store away and make it anew"
            ) from error
        if pretend:
            return _repair(place, manifest, pretend, tell, forget)
        with place.lock():
            place.clear()
            return _repair(place, manifest, pretend, tell, forget)


def _repair(
    place: Place, manifest: Manifest, pretend: bool, tell: Tell, forget: Callable[[], None]
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
        tell("repair", manifest.shard_rows(index).stop, manifest.sequences)
    strays = stray_names(manifest, names)
    for stray in strays if not pretend else ():
        place.remove(f"{SHARDS}/{stray}")
    missing = manifest.shards - len(done) + len(dropped)
    return Repaired(problems=problems, dropped=dropped, strays=strays, missing=missing)


def _drop(place: Place, manifest: Manifest, index: int) -> None:
    # the record first: what is left of the data, should this be interrupted, is a stray
    place.remove(commit_name(index))
    place.remove(shard_name(index, manifest.make_store(place).suffix))
