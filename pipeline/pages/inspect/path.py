"""What a path to look at names: a store, a run, or one shard."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ....data.errors import ColdstillError
from ....data.formats import STORES
from ....data.places.opening import place_at
from ....data.store.layout import MANIFEST, SHARDS
from ....data.store.reader import StoreReader, open_store
from ...recipe.run_folder import recorded_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A store, or one shard of it."""

    store: StoreReader
    path: str
    """Where it is, as a person would type it."""
    shard: int | None = None
    """The only shard that is looked at."""
    note: str = ""
    """What a person should know about how it was found."""

    @property
    def shards(self) -> list[int]:
        """The shards that are looked at and are there."""
        return self.store.done if self.shard is None else [self.shard]

    def expect(self, row: int) -> None:
        """Refuse a sequence that cannot be shown.

        Raises
            ColdstillError: there is no such sequence, or its shard is another or missing
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
    """A shard of which no manifest speaks."""

    path: Path
    store: str
    """The name of its format."""
    why: str
    """Why it is looked at by itself."""


def find(path: str) -> Subject | LoneShard:
    """What to look at.

    Raises
        ColdstillError: neither a store, nor a run that has one, nor a shard
    """
    plain = path.rstrip("/") or path
    for name, kind in STORES.items():
        if plain.endswith(kind.suffix) and not place_at(path).exists(MANIFEST):
            return _shard(plain, name)
    place = place_at(path)  # which names an address without its password
    if "://" not in path and Path(path).is_file():
        kinds = ", ".join(f"*{kind.suffix}" for kind in STORES.values())
        raise ColdstillError(f"{path}: a file, but no shard ({kinds})")
    if "://" not in path and not place.exists(MANIFEST):
        run = recorded_run(Path(path))
        logits, heldout = place_at(run.logits), place_at(run.heldout)
        if logits.exists(MANIFEST):
            note = f"{path} is a run: this is its store {logits}"
            if heldout.exists(MANIFEST):
                note += f"; it has another, {heldout}"
            store = open_store(run.logits, incomplete=True, cache=run.cache)
            return Subject(store=store, path=str(logits), note=note)
    return Subject(store=open_store(path, incomplete=True), path=str(place))


def _shard(path: str, store: str) -> Subject | LoneShard:
    """A path that ends as shards do."""
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
        raise ColdstillError(f"{path}: not there")
    return LoneShard(path=Path(path), store=store, why=why)


def _two_up(path: str) -> tuple[str, str, str]:
    """The folder two levels up, the one between, and the name."""
    if "://" in path:
        folder, _, name = path.rpartition("/")
        root, _, between = folder.rpartition("/")
        return root, between, name
    whole = Path(path)
    if whole.parent.name != SHARDS:  # named from inside the store
        whole = Path(os.path.abspath(whole))
    return str(whole.parent.parent), whole.parent.name, whole.name
