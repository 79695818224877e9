"""A YAML file as lm-eval reads it: with `include` and `!function`, neither of which is run here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class FunctionName:
    """`!function module.name`: the module may stand beside the file that says it."""

    folder: Path
    name: str

    @property
    def module(self) -> Path:
        """Where it would stand."""
        module = self.name.rpartition(".")[0].replace(".", "/")
        return self.folder / f"{module}.py"


@dataclass(frozen=True, slots=True)
class YamlFile:
    """What a file says, with what it includes."""

    settings: dict[str, Any]
    files: tuple[Path, ...]
    """This one, those that it includes, and modules of functions that are beside one of them."""


def read_yaml(path: Path) -> YamlFile | None:
    """A YAML file, or None if it holds something else than keys and values.

    Raises
        ColdstillError: it cannot be read, is no YAML, or includes what is not there or itself
    """
    found = _read(path, ())
    if found is None:
        return None
    settings, files = found
    modules = [name.module for name in _functions(settings) if name.module.is_file()]
    return YamlFile(settings, tuple(dict.fromkeys([*files, *modules])))


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]] | None:
    own = _parse(path)
    if not isinstance(own, dict):
        return None
    included = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        target = path.parent / str(name)
        if target.resolve() in (p.resolve() for p in (*above, path)):
            raise ColdstillError(f"{path}: includes {name}, which includes this file again")
        if not target.is_file():
            raise ColdstillError(f"{path}: includes {name}, which is not there")
        found = _read(target, (*above, path))
        if found is None:
            raise ColdstillError(f"{path}: includes {name}, which holds no keys and values")
        merged.update(found[0])
        files += found[1]
    return {**merged, **own}, files


def _parse(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Knows the one tag that lm-eval adds."""

    def function(loader: Any, node: Any) -> FunctionName:
        return FunctionName(path.parent, str(loader.construct_scalar(node)))

    Loader.add_constructor("!function", function)
    try:
        return yaml.load(path.read_bytes(), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ColdstillError(f"{path}: no YAML: {line}{reason}") from error
    except (UnicodeError, ValueError, RecursionError) as error:
        raise ColdstillError(f"{path}: no YAML: {error}") from error


def _functions(value: Any) -> Iterator[FunctionName]:
    if isinstance(value, FunctionName):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _functions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _functions(inner)
