"""Pages that need nothing outside themselves: one file, and a policy that browsers enforce.

Text from recipes, corpora and models is hostile: the templates escape all of it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ...data.errors import ColdstillError
from ...data.files import whole_file
from .plots.chart import colour, dashes, mark
from .plots.drawing import STYLE

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither HTML nor a UTF-8 file can hold."""
_MANY = 4
"""Line ends in a row from which on they are counted instead of shown."""
_TEMPLATES = Path(__file__).parent / "templates"


def policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy that allows this style and this script and nothing else."""
    allowed = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_digest(style)}"
    return allowed if script is None else f"{allowed}; script-src {_digest(script)}"


def rendered(template: str, **values: Any) -> str:
    """A page from its template, which extends `page.html`.

    Raises
        jinja2.UndefinedError: the template uses a value that was not given
    """
    style = STYLE + "".join(
        (_TEMPLATES / name).read_text(encoding="utf-8")
        for name in ("page.css", template.replace(".html", ".css"))
        if (_TEMPLATES / name).exists()
    )
    page = _environment().get_template(template)
    return page.render(style=Markup(style), policy=policy(style), version=__version__, **values)


def write_file(path: Path, page: str) -> None:
    """Write a page or picture whole."""
    expect_file(path)
    with whole_file(path) as scratch:
        scratch.write_bytes(page.encode())


def expect_file(path: Path) -> None:
    """Raise ColdstillError if a page would replace a folder."""
    if path.is_dir():
        raise ColdstillError(f"{path}: a folder; name the file that the page is to be")


def printable(text: str) -> str:
    """The text with a replacement character for each one that a page cannot hold."""
    return _UNSEEN.sub("\ufffd", text)


def named(sentence: str) -> Markup:
    """A sentence whose names in backquotes are bold."""
    pieces = re.split(r"`([^`]*)`", printable(sentence))
    bold = Markup("<b>{}</b>")
    return Markup("").join(bold.format(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def prose(text: str) -> Markup:
    """Text with its own line ends, but many of them in a row as a number."""
    pieces = re.split(rf"(\n{{{_MANY},}})", printable(text))
    ends = Markup("<i> {} line ends </i>")
    return Markup("").join(ends.format(len(p)) if i % 2 else p for i, p in enumerate(pieces))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals |= {"colour": colour, "dashes": dashes, "mark": mark}
    environment.filters |= {"named": named, "prose": prose}
    return environment


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
