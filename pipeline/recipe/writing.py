"""Writes recipe files: a new one for `coldstill init`, and `logits.head` and `logits.tail` in a
user's own.

tomlkit edits the text of an existing file. The result is then read by Python's own TOML reader, and
nothing is written unless it differs from the original in these two numbers alone.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import whole_file
from ...data.places.place import place_at
from ...data.store.layout import MANIFEST
from .reading import BYTE_ORDER_MARK, RESOLVED, read_text

if TYPE_CHECKING:
    from .reading import LoadedRecipe
    from .run_folder import Run


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
objective = {{ kl = 0.5, cross_entropy = 0.5 }}   # ahead of the text alone at every length measured
train = {{ steps = 2000, batch_tokens = 65536, learning_rate = 1e-3 }}

[students.baseline]       # the same training without a teacher, for comparison
like = "small"
objective = {{ kl = 0.0, cross_entropy = 1.0 }}
"""


def write_starter(folder: Path, name: str) -> Path:
    """Write `NAME.toml`, given NAME or NAME.toml; an existing file is never replaced.

    Raises
        ColdstillError: the name is not fit for a run, or the file exists
    """
    name = name.removesuffix(".toml")
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


def editable_recipe(name: str, loaded: LoadedRecipe, run: Run) -> Path:
    """Return the file that `--write` will change; called before anything is measured.

    name  the recipe as it was given on the command line

    Raises
        ColdstillError: the recipe is not a file of the user, or its run already has a store
    """
    path = next((p for p in (Path(name), Path(f"{name}.toml")) if p.is_file()), None)
    is_runs_own = path is not None and (path.parent / RESOLVED).exists()
    if path is None or is_runs_own or read_text(path) != loaded.text:
        raise ColdstillError(
            f"--write: {name} is built in or a run's own record, not a recipe to be edited; copy "
            "it to a file, or put the recommended line into the file it was made from"
        )
    place = place_at(run.logits)
    if place.exists(MANIFEST):
        raise ColdstillError(
            f"--write: {place} already exists and would no longer match the changed recipe; copy "
            "the recipe under another name and write into that"
        )
    _edited(path, loaded.text, loaded.recipe.logits.head, loaded.recipe.logits.tail)
    return path


def write_capture(path: Path, head: int, tail: int) -> bool:
    """Set `logits.head` and `logits.tail` in a recipe's file; return whether the file changed.

    Raises
        ColdstillError: tomlkit cannot change these two numbers alone
    """
    text = read_text(path)
    changed = _edited(path, text, head, tail)
    if changed == text:
        return False
    target = path.resolve()  # keeps a symbolic link a link
    with whole_file(target) as scratch:
        scratch.write_bytes(changed.encode())
        shutil.copymode(target, scratch)
    return True


def _edited(path: Path, text: str, head: int, tail: int) -> str:
    """Return the text with both numbers; raises as `write_capture`."""
    plain = text.removeprefix(BYTE_ORDER_MARK)
    wanted = tomllib.loads(plain)
    wanted.setdefault("logits", {}).update(head=head, tail=tail)
    from tomlkit.exceptions import TOMLKitError

    changed, found = "", None
    try:
        changed = _with_values(plain, {"head": head, "tail": tail})
        if "\r\n" in plain and "\n" not in plain.replace("\r\n", ""):
            changed = changed.replace("\r\n", "\n").replace("\n", "\r\n")  # the added lines too
        found = tomllib.loads(changed)
    except (TOMLKitError, tomllib.TOMLDecodeError):
        pass  # reported below
    if found != wanted:
        raise ColdstillError(
            f"--write: {path}: the table 'logits' cannot be edited without changing other keys; "
            f"set logits.head = {head} and logits.tail = {tail} by hand"
        )
    return text[: len(text) - len(plain)] + changed


def _with_values(text: str, values: dict[str, int]) -> str:
    import tomlkit
    from tomlkit.items import Item, Table

    document = tomlkit.parse(text)
    if "logits" not in document:
        if document.body:
            document.add(tomlkit.nl())
        document.add("logits", tomlkit.table())
    table: Any = document["logits"]
    trailing: list[Item] = []
    if isinstance(table, Table):
        # comments before the next heading stay below the new keys
        body = table.value.body
        while body and body[-1][0] is None:
            trailing.append(body.pop()[1])
    for key, value in values.items():
        if table.get(key) != value:
            table[key] = value
    for item in reversed(trailing):
        table.add(item)
    return tomlkit.dumps(document)
