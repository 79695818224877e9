"""The corpus of the standard library: the source files of the running Python."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from pathlib import Path

from ..errors import ColdstillError

# Tests are mostly tables of literals, and installed packages differ between machines.
_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


def stdlib_files() -> list[tuple[str, Path]]:
    """Name and path of every module of the standard library, such as `json/decoder.py`, sorted.

    Raises
        ColdstillError: this Python was installed without its sources
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not found:
        raise ColdstillError(f"stdlib: no Python sources in {root}; name other files instead")
    return sorted(found)


def read_python(path: Path) -> str:
    r"""A module's text with `\n` line endings; empty if its encoding is invalid.

    Such files exist on purpose, as tests of the compiler.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
