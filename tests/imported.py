"""Imports the caches of `caches`, and reads the stores back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from caches import WRITERS, Known
from coldstill.data.imports.importing import Importer, Result
from coldstill.data.imports.plan import Request
from coldstill.data.maintenance.verify import verify
from coldstill.data.store.reader import open_store
from coldstill.pipeline.steps.imports import load_pickled, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block
    from coldstill.data.store.manifest import Manifest
    from coldstill.data.store.provenance import Imported


@dataclass(frozen=True)
class Made:
    """An imported store."""

    block: Block
    manifest: Manifest
    said: list[str]

    @property
    def imported(self) -> Imported:
        assert self.manifest.imported is not None
        return self.manifest.imported


def request(source: Path, store: Path, tokenizer: Any, **changes: Any) -> Request:
    """A request for a folder of `caches`, with the parameters and tokens beside it."""
    given: dict[str, Any] = {"load_pickled": load_pickled}
    for config in sorted(source.glob("*.json")) if source.is_dir() else ():
        given["config"] = read_config(str(config))
    if (source.parent / "sequences.jsonl").is_file():
        given["tokens"] = (str(source.parent / "sequences.jsonl"),)
    return Request(source=(str(source),), store=str(store), tokenizer=tokenizer, **given | changes)


def run(wanted: Request, said: list[str] | None = None) -> Result:
    heard = [] if said is None else said
    return Importer(wanted, lambda positions, records: None, heard.append).run()


def imported(source: Path, store: Path, tokenizer: Any, **changes: Any) -> Made:
    """Import a folder and read the store back."""
    said: list[str] = []
    result = run(request(source, store, tokenizer, **changes), said)
    assert list(verify(str(store))) == []
    reader = open_store(store)
    assert reader.manifest == result.manifest
    assert not (store / "import").exists()
    return Made(reader.read(np.arange(len(reader))), reader.manifest, said)


def written(kind: str, cache: Known, folder: Path) -> Path:
    WRITERS[kind](folder / kind, cache)
    return folder / kind
