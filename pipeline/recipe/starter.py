"""The recipe that `coldstill init` writes: every table, with what one would change first."""

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

[corpus]                  # what the teacher reads
files = ["texts/"]        # paths, globs, folders of .txt .jsonl .json .parquet, hub:ORG/NAME
sequence_length = 1024
holdout = 0.02            # share of documents kept for evaluation

[teacher]
model = "ORG/NAME"        # a hub name, or a folder beside this file

[logits]                  # what is kept of the teacher at each position
head = 0                  # its most probable tokens, exactly; worth it with temperatures
tail = 50                 # samples of the rest, unbiased

[students.small]          # as many students as wanted, all from the same store
architecture = {{ layers = 6, hidden = 512, heads = 8 }}
# instead of architecture: prune = {{ parameters = "50%" }} or layers = {{ every = 2 }}, of the
# teacher, or model = "ORG/NAME"; each may have lora = {{ rank = 16 }}: adapters, merged in the end
objective = {{ kl = 1.0, cross_entropy = 0.0 }}
train = {{ steps = 2000, batch_tokens = 65536, learning_rate = 1e-3 }}

[students.baseline]       # the same without a teacher, to see what distillation wins
like = "small"
objective = {{ kl = 0.0, cross_entropy = 1.0 }}
"""


def write_starter(folder: Path, name: str) -> Path:
    """Write `NAME.toml`; never over a file that is there.

    Raises
        ColdstillError: the name cannot name a run, or the file exists
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ColdstillError(
            f"init: {name!r} cannot name a run; use letters, digits, dots, dashes and underscores"
        )
    path = folder / f"{name}.toml"
    if path.exists():
        raise ColdstillError(f"{path}: already there; choose another name or edit it")
    with whole_file(path) as scratch:
        scratch.write_text(_STARTER.format(name=name), encoding="utf-8")
    return path
