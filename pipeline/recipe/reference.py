"""The recipe reference: every table and key, made from the classes that read a recipe.

`python -m coldstill.pipeline.recipe.reference FILE` renews the reference in a Markdown file.
"""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from ...data.errors import ColdstillError
from ...data.files import whole_file
from .fields import Table, tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .fields import Key

BEGIN, END = "<!-- recipe reference: begin -->", "<!-- recipe reference: end -->"
RENEW = "python -m coldstill.pipeline.recipe.reference"
_WIDTH = 100
_TOP = "recipe"
"""Title of the top level, which has no name of its own."""


def overview() -> str:
    """Return all tables for a terminal: their meaning and the names of their keys."""
    blocks = []
    for table in tables():
        names = ", ".join(key.name for key in table.keys)
        blocks.append("\n".join([_title(table), *_wrapped(table.meaning, 2), *_wrapped(names, 4)]))
    more = "coldstill recipe-help KEY explains one table or key, such as corpus or train.steps."
    return "\n\n".join([*blocks, more])


def explained(name: str) -> str:
    """Return the table or key of this name for a terminal, with types, defaults and meanings.

    name  a whole name such as `students.small.train.steps`, or the end of one such as `steps`; an
          end that several tables share shows all of them

    Raises
        ColdstillError: unknown name; the message has the nearest one
    """
    wanted = re.sub(r"^students\.[^.]+", "students.NAME", name)
    found = [_table_text(t) for t in tables() if any(_ends(place, wanted) for place in t.places)]
    for table in tables():
        table_of, _, key_name = wanted.rpartition(".")
        if any(_ends(place, table_of) for place in table.places):
            found += [
                "\n".join([_title(table), *_key_lines(key)])
                for key in table.keys
                if key.name == key_name
            ]
    if found:
        return "\n\n".join(found)
    keys = {key.name for table in tables() for key in table.keys}
    places = {place for table in tables() for place in table.places if place}
    whole = {
        f"{place}.{key.name}" for table in tables() for place in table.places for key in table.keys
    }
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, whole | places, 1, cutoff=0.7)
    near = near or difflib.get_close_matches(last, keys, 1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise ColdstillError(
        f"recipe-help: a recipe has no table or key '{name}'{guess} (coldstill recipe-help lists "
        "all of them)"
    )


def markdown() -> str:
    """Return the whole reference as Markdown."""
    parts = []
    for table in tables():
        rows = [
            (f"`{key.name}`", *map(_escaped, (key.values, f"`{key.default}`", key.meaning)))
            for key in table.keys
        ]
        body = tabulate(rows, ("key", "value", "default", "meaning"), "pipe", disable_numparse=True)
        compact = re.sub(r" {2,}", " ", re.sub(r"-{4,}", "---", body))
        title = ", ".join(f"`{place}`" for place in table.places if place) or "Top level"
        parts.append(f"### {title}\n\n{table.meaning}\n\n{compact}\n")
    return "\n".join(parts)


def renewed(text: str) -> str:
    """Return a Markdown page with the reference between its two markers.

    Raises
        ColdstillError: the page lacks the markers
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ColdstillError(f"no recipe reference in this page: it needs {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def _title(table: Table) -> str:
    return ", ".join(table.places) or _TOP


def _ends(place: str, wanted: str) -> bool:
    """Return whether a name is the whole name of a table or its last parts."""
    return not wanted or f".{place or _TOP}".endswith(f".{wanted}")


def _table_text(table: Table) -> str:
    lines = [_title(table), *_wrapped(table.meaning, 2)]
    for key in table.keys:
        lines += ["", *_key_lines(key)]
    return "\n".join(lines)


def _key_lines(key: Key) -> list[str]:
    default = key.default if key.default in ("required", "unset") else f"default {key.default}"
    return [f"  {key.name}: {key.values}; {default}", *_wrapped(key.meaning, 6)]


def _wrapped(text: str, indent: int) -> list[str]:
    blanks = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=blanks, subsequent_indent=blanks)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    """Renew the reference in the Markdown files that are named."""
    for name in arguments:
        path = Path(name)
        text = renewed(path.read_text(encoding="utf-8"))
        with whole_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
