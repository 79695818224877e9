"""The corpus that every machine has: the sources of the Python that runs."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from pathlib import Path

from ..errors import ColdstillError

# Tests are mostly tables of odd literals, and installed packages differ between machines.
_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


def stdlib_files() -> list[tuple[str, Path]]:
    """`("json/decoder.py", path)` of every module of the standard library, sorted by name.

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
        raise ColdstillError(f"stdlib: no Python sources in {root}; name files of your own instead")
    return sorted(found)


def read_python(path: Path) -> str:
    r"""A module's text with `\n` line endings; empty where its bytes are not what it declares.

    Such files exist on purpose, to try out the compiler.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
