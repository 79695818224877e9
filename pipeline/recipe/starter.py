"""The recipe that `coldstill init` writes: every table, with the keys that users change first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.files import whole_file

if TYPE_CHECKING:
    from pathlib import Path

_STARTER = """\
# coldstill recipe-help KEY explains a key.
name = "{name}"
seed = 0

[corpus]                  # the documents
files = ["texts/"]        # paths, globs, folders of .txt .jsonl .json .parquet, hub:ORG/NAME
sequence_length = 1024
holdout = 0.02            # share of documents kept for evaluation

[teacher]
model = "ORG/NAME"        # a hub name, or a folder beside this file

[logits]                  # what is stored for each position
head = 0                  # this many most probable tokens, exactly; pays off for temperatures
tail = 50                 # this many samples of the rest, unbiased

[students.small]          # any number of students, all trained from the same store
architecture = {{ layers = 6, hidden = 512, heads = 8 }}
# instead of architecture: model = "ORG/NAME", or a part of the teacher: layers = {{ every = 2 }} or
# prune = {{ parameters = "50%" }}; each of these three can have lora = {{ rank = 16 }}, adapters
objective = {{ kl = 1.0, cross_entropy = 0.0 }}
train = {{ steps = 2000, batch_tokens = 65536, learning_rate = 1e-3 }}

[students.baseline]       # the same training without a teacher, for comparison
like = "small"
objective = {{ kl = 0.0, cross_entropy = 1.0 }}
"""


def write_starter(folder: Path, name: str) -> Path:
    """Write `NAME.toml`; an existing file is never replaced.

    Raises
        ColdstillError: the name is not fit for a run, or the file exists
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ColdstillError(
            f"init: {name!r} cannot name a run; use letters, digits, dots, dashes and underscores"
        )
    path = folder / f"{name}.toml"
    if path.exists():
        raise ColdstillError(f"{path}: exists already; choose another name or edit it")
    with whole_file(path) as scratch:
        scratch.write_text(_STARTER.format(name=name), encoding="utf-8")
    return path
