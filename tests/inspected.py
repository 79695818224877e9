"""A small store whose tokens are hostile text, for the tests of `inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from coldstill.data.store.layout import TOKENIZER
from coldstill.data.store.reader import open_store
from oracles import FULL, VOCABULARY, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block, Capture
    from desk import Desk

HOSTILE = (
    "</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "@@DATA@@",
    "@@SCRIPT@@",
    '"',
    "&amp;",
    "\x1b[31m",
    "\u202e",
    " two",
    "\n",
    "\n    ",
    "\t",
    " ",
    "\u65e5\u672c",
    "\\",
    "'; throw 1; '",
    "\u2028",
)
TOKENS = (*HOSTILE, *(f" word{i}" for i in range(len(HOSTILE), VOCABULARY)))
"""The text of each id."""
SEQUENCES = 10
LONG = 1
"""The fullest sequence: ten tokens of three documents, seven of them labels."""


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer with the table `TOKENS` whose tokens are their texts."""
    from tokenizers import Tokenizer, models

    model: Any = models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=TOKENS[0])
    folder.mkdir(parents=True)
    Tokenizer(model).save(str(folder / "tokenizer.json"))


def write_store(
    root: Path, capture: Capture = FULL, *, codec: str = "plain", store: str = "arrow"
) -> Block:
    """Write a store of ten sequences in three shards; returns its content."""
    block = random_block(7, SEQUENCES, capture)
    write_missing(root, manifest_for(block, codec=codec, store=store), block)
    write_tokenizer(root / TOKENIZER)
    return open_store(root).read(np.arange(SEQUENCES))


def desk_at(root: Path) -> Desk:
    """A desk in a folder; pytest must have loaded the plugin `desk` before this imports it."""
    from desk import Desk

    return Desk(root)


def shown(desk: Desk, *arguments: str) -> Any:
    """The JSON that `inspect` prints."""
    return json.loads(desk.done("inspect", *arguments, "--json").stdout)
