"""Writes head and tail into a recipe's file and leaves every other byte as it is.

The file is edited as text, line by line, and the result is then read as TOML: unless it says what
it said before with these two numbers changed, nothing is written.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import whole_file
from ...data.places.opening import place_at
from ...data.store.layout import MANIFEST
from .reading import RESOLVED

if TYPE_CHECKING:
    from .reading import LoadedRecipe
    from .run_folder import Run

_BOM = "\ufeff"


def editable_recipe(name: str, loaded: LoadedRecipe, run: Run) -> Path:
    """The file that `--write` would change, asked before anything is measured.

    name  as it was given on the command line

    Raises
        ColdstillError: the recipe is no file of the user's, or its run has a store already
    """
    path = next((p for p in (Path(name), Path(f"{name}.toml")) if p.is_file()), None)
    is_runs_own = path is not None and (path.parent / RESOLVED).exists()
    if path is None or is_runs_own or _text(path) != loaded.text:
        raise ColdstillError(
            f"--write: {name} is built in or a run's own record, not a recipe to be edited; copy "
            "it to a file, or put the recommended line into the file it was made from"
        )
    place = place_at(run.logits)
    if place.exists(MANIFEST):
        raise ColdstillError(
            f"--write: {place} is there already, with what this recipe keeps, and would no longer "
            "fit it; copy the recipe under another name and write into that"
        )
    _edited(path, loaded.text, loaded.recipe.logits.head, loaded.recipe.logits.tail)
    return path


def write_capture(path: Path, head: int, tail: int) -> bool:
    """Set `logits.head` and `logits.tail` in a recipe's file; whether that changed anything.

    Raises
        ColdstillError: they stand there in a way that is not edited (an inline table, dotted keys)
    """
    text = _text(path)
    changed = _edited(path, text, head, tail)
    if changed == text:
        return False
    target = path.resolve()  # a link stays a link
    with whole_file(target) as scratch:
        scratch.write_bytes(changed.encode())
        shutil.copymode(target, scratch)
    return True


def _edited(path: Path, text: str, head: int, tail: int) -> str:
    """The text with both numbers; raises as `write_capture`."""
    changed = text
    # the second first: a key that is put in comes right below the table's heading
    for key, value in (("tail", tail), ("head", head)):
        changed = _with_key(changed, key, value)
    wanted = tomllib.loads(text.removeprefix(_BOM))
    wanted.setdefault("logits", {}).update(head=head, tail=tail)
    try:
        found: Any = tomllib.loads(changed.removeprefix(_BOM))
    except tomllib.TOMLDecodeError:
        found = None
    if found != wanted:
        raise ColdstillError(
            f"--write: {path}: 'logits' is written in a way that is not edited here (an inline "
            f"table or dotted keys); set logits.head = {head} and logits.tail = {tail} by hand"
        )
    return changed


def _with_key(text: str, key: str, value: int) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split("\n")  # the carriage return before it, if any, stays with its line
    heading = next((i for i, line in enumerate(lines) if _HEADING.fullmatch(line)), None)
    if heading is None:
        gap = "" if not text or text.endswith("\n") else newline
        return f"{text}{gap}{newline}[logits]{newline}{key} = {value}{newline}"
    setting = re.compile(rf"(\s*{key}\s*=\s*)[0-9_xobA-Fa-f+]+(\s*(?:#.*)?)")
    for i in range(heading + 1, len(lines)):
        if _TABLE.match(lines[i]):
            break
        if found := setting.fullmatch(lines[i]):
            lines[i] = f"{found[1]}{value}{found[2]}"
            return "\n".join(lines)
    if heading == len(lines) - 1:  # the heading is the file's last line, without an end
        return f"{text}{newline}{key} = {value}{newline}"
    end = newline.removesuffix("\n")
    lines.insert(heading + 1, f"{key} = {value}{end}")
    return "\n".join(lines)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


_HEADING = re.compile(r"\ufeff?\s*\[\s*logits\s*\]\s*(#.*)?")
_TABLE = re.compile(r"\s*\[")
