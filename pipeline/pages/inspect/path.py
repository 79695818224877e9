"""Finds out what a path names: a store, a run, or one shard."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ....data.errors import ColdstillError
from ....data.formats import STORES
from ....data.places.place import place_at
from ....data.store.layout import MANIFEST, SHARDS
from ....data.store.reader import StoreReader, open_store
from ...recipe.run_folder import recorded_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A store, or one shard of it."""

    store: StoreReader
    path: str
    """Its path as a user would type it."""
    shard: int | None = None
    """The only shard that is shown; None for the whole store."""
    note: str = ""
    """How the store was found, if the path is not the store itself."""

    @property
    def shards(self) -> list[int]:
        """The finished shards that are shown."""
        return self.store.done if self.shard is None else [self.shard]

    def expect(self, row: int) -> None:
        """Check that a sequence can be shown.

        Raises
            ColdstillError: no such sequence, or it is in another or a missing shard
        """
        manifest = self.store.manifest
        if not 0 <= row < manifest.sequences:
            last = manifest.sequences - 1
            has = f"its sequences are 0 to {last}" if last >= 0 else "it has no sequences"
            raise ColdstillError(f"{self.path}: no sequence {row}; {has}")
        if self.shard is not None and row not in (rows := manifest.shard_rows(self.shard)):
            raise ColdstillError(
                f"{self.path}: no sequence {row}; this shard holds {rows.start} to {rows.stop - 1}"
            )
        if (shard := row // manifest.shard_sequences) not in self.shards:
            raise ColdstillError(
                f"{self.path}: sequence {row} is in shard {shard}, which is missing; finish the "
                "store with coldstill teacher-logits"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneShard:
    """A shard without the manifest of its store."""

    path: Path
    store: str
    """Name of the file format."""
    why: str
    """Why the store is not known."""


def find(path: str) -> Subject | LoneShard:
    """Return the store, the run's store or the shard at a path.

    Raises
        ColdstillError: the path is not a store, a run or a shard
    """
    plain = path.rstrip("/") or path
    for name, kind in STORES.items():
        if plain.endswith(kind.suffix) and not place_at(path).exists(MANIFEST):
            return _shard(plain, name)
    place = place_at(path)  # shows an address without its password
    if "://" not in path and Path(path).is_file():
        kinds = ", ".join(f"*{kind.suffix}" for kind in STORES.values())
        raise ColdstillError(f"{path}: a file that is not a shard ({kinds})")
    if "://" not in path and not place.exists(MANIFEST):
        run = recorded_run(Path(path))
        logits, heldout = place_at(run.logits), place_at(run.heldout)
        if logits.exists(MANIFEST):
            note = f"{path} is a run; its store {logits} is shown"
            if heldout.exists(MANIFEST):
                note += f"; it also has {heldout}"
            store = open_store(run.logits, incomplete=True, cache=run.cache)
            return Subject(store=store, path=str(logits), note=note)
    return Subject(store=open_store(path, incomplete=True), path=str(place))


def _shard(path: str, store: str) -> Subject | LoneShard:
    """Return a shard by its path, with its store if that is found."""
    suffix = STORES[store].suffix
    root, folder, name = _two_up(path)
    index = name.removesuffix(suffix)
    why = f"there is no {MANIFEST} in {place_at(root)}"
    if folder == SHARDS and index.isdecimal() and place_at(root).exists(MANIFEST):
        opened = open_store(root, incomplete=True)
        if opened.manifest.make_store(root).suffix == suffix and int(index) in opened.done:
            path = opened.place.path(f"{folder}/{name}")
            return Subject(store=opened, path=path, shard=int(index))
        why = f"the store {opened.place} has no commit record of it"
    if "://" in path:
        raise ColdstillError(f"{place_at(path)}: {why}")
    if not Path(path).exists():
        raise ColdstillError(f"{path}: does not exist")
    return LoneShard(path=Path(path), store=store, why=why)


def _two_up(path: str) -> tuple[str, str, str]:
    """Return the folder two levels up, the name of the folder between, and the file name."""
    if "://" in path:
        folder, _, name = path.rpartition("/")
        root, _, between = folder.rpartition("/")
        return root, between, name
    whole = Path(path)
    if whole.parent.name != SHARDS:  # named from inside the store
        whole = Path(os.path.abspath(whole))
    return str(whole.parent.parent), whole.parent.name, whole.name
