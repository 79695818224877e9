"""Writes the golden stores of the present format that are missing: `python tests/golden/make.py`.

They are committed and never written again: what an old coldstill wrote must stay readable.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from coldstill import __version__
from coldstill.data.codecs import CODECS
from coldstill.data.files import tokens_sha256
from coldstill.data.formats import STORES
from coldstill.data.schema import Block, Ragged, Sequences, Targets
from coldstill.data.store.manifest import FORMAT_VERSION, Manifest
from coldstill.data.store.writer import with_error
from oracles import VOCABULARY, manifest_for, random_block, write_missing
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

HERE = Path(__file__).parent


def main() -> None:
    """Write each missing pair of codec and store, and what reading it gives."""
    folder = HERE / f"v{FORMAT_VERSION}"
    block = random_block(20, 5)
    table = {f"token{i}": i for i in range(VOCABULARY)}
    for codec in CODECS:
        for store in STORES:
            if (folder / f"{codec}-{store}").exists():
                continue
            # a Zarr group has many files: one shard is enough of them
            shard = 3 if store == "arrow" else 5
            manifest = manifest_for(
                block, shard_sequences=shard, block_sequences=2, codec=codec, store=store
            )
            tokenizer = replace(manifest.tokenizer, fingerprint=tokens_sha256(table))
            manifest = with_error(replace(manifest, tokenizer=tokenizer), block)
            _write(folder / f"{codec}-{store}", manifest, block, table)
    version = {"coldstill": __version__, "format": FORMAT_VERSION}
    if not (folder / "written_by.json").exists():
        (folder / "written_by.json").write_text(json.dumps(version) + "\n")


def _write(root: Path, manifest: Manifest, block: Block, table: dict[str, int]) -> None:
    write_missing(root, manifest, block)
    (root / "tokenizer").mkdir()
    Tokenizer(WordLevel(table, unk_token="token0")).save(str(root / "tokenizer/tokenizer.json"))
    codec = manifest.make_codec(root)
    expected = as_json(codec.decode(codec.encode(block), block.capture))
    (root.parent / f"{root.name}.json").write_text(json.dumps(expected, indent=0) + "\n")
    shutil.rmtree(root / "__pycache__", ignore_errors=True)


def as_json(block: Block) -> dict[str, Any]:
    """Everything that a block holds, as lists; infinities as text."""
    parts = ((Sequences, block.sequences), (Targets, block.targets))
    return {
        field.name: _listed(getattr(value, field.name))
        for kind, value in parts
        for field in fields(kind)
    }


def _listed(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Ragged):
        return [row.tolist() for row in value]
    return value.tolist()


if __name__ == "__main__":
    main()
