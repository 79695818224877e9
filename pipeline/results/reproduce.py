"""How to make a run again: its recipe, changed settings, commands, and the machine it ran on."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ..recipe.reading import BUILT_IN, RESOLVED, RecipeSource
from .model_tables import machine_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..recipe.run_folder import Run
    from .figures import ModelFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What to type, and where the run was made."""

    recipe: str | None
    """Text of the recipe; None where it is not in the run."""
    commands: list[str]
    settings: list[str] | None
    """Settings besides the recipe, as `--set` takes them; None where TOML cannot express them."""
    students_beside: list[str]
    """Trained students that the recipe does not name."""
    environment: dict[str, str]
    """Versions and platform."""
    machines: list[str]


def reproduction(run: Run, rows: Sequence[ModelFigures]) -> Reproduction:
    """The commands that make a run with these figures again."""
    text = _text(run.verbatim)
    changes, beside = (None, {}) if text is None else _changes(run, text)
    return Reproduction(
        recipe=text,
        commands=[*_commands(run, text, changes, beside), *_last(run, rows)],
        settings=changes,
        students_beside=sorted(beside),
        environment=_environment(run.environment),
        machines=list(machine_groups(rows)),
    )


def _commands(
    run: Run, text: str | None, changes: Sequence[str] | None, beside: Mapping[str, Any]
) -> list[str]:
    """Commands in their order, with comments for the reader."""
    root, name = shlex.quote(str(run.root)), run.root.name
    found = []
    if text is not None and changes is not None:
        built_in = BUILT_IN / f"{name}.toml"
        own = built_in.is_file() and _text(built_in) == text
        recipe = shlex.quote(name if own else f"{name}.toml")
        note = "" if own else "   # the recipe below, under this name"
        found.append(f"coldstill run {recipe}{_where(run)}{_sets(changes)}{note}")
        for student, table in sorted(beside.items()):
            sets = _sets([f"students.{_part(student)}={_toml(table)}"])
            found.append(f"coldstill train-student {root} --student {shlex.quote(student)}{sets}")
        if beside:
            found.append(f"coldstill evaluate {root}")
    else:
        found.append(f"coldstill run {root}   # with its own record for a recipe")
    return found


def _where(run: Run) -> str:
    """The option that puts a run into its folder, where that is not the default one."""
    parent = str(run.root.parent)
    return "" if parent == "runs" else f" --runs {shlex.quote(parent)}"


def _sets(changes: Sequence[str]) -> str:
    return "".join(f" --set {shlex.quote(change)}" for change in changes)


def _last(run: Run, rows: Sequence[ModelFigures]) -> list[str]:
    """Commands after training: the exports that exist, and the report."""
    root, exports = shlex.quote(str(run.root)), [row for row in rows if row.is_export]
    found = []
    for student in dict.fromkeys(str(row.of) for row in exports):
        formats = (f" --to {row.format}" for row in exports if row.of == student)
        found.append(f"coldstill export {root} {shlex.quote(student)}{''.join(formats)}")
    return [*found, f"coldstill report {root}"]


def _changes(run: Run, text: str) -> tuple[list[str] | None, dict[str, Any]]:
    """Settings that the recipe's file does not have, and the tables of trained students that it
    does not name."""
    try:
        recorded = read_json(run.resolved)
        source = RecipeSource(
            tomllib.loads(text.removeprefix("\ufeff")), Path(recorded["base"]), text, RESOLVED
        )
        written = json.loads(source.validated().recipe.model_dump_json())
        students = recorded["recipe"]["students"]
        own = {name: students[name] for name in students if name in written["students"]}
        # the run is named after its folder, not after its recipe
        now = {**recorded["recipe"], "students": own, "name": run.root.name}
        beside = {
            name: table
            for name, table in students.items()
            if name not in own and run.student(name).model.exists()
        }
        for table in beside.values():
            _toml(table)
        return list(_settings(written, now, ())), beside
    except (ColdstillError, tomllib.TOMLDecodeError, LookupError, TypeError, ValueError):
        return None, {}


def _settings(old: Any, new: Any, key: tuple[str, ...]) -> Iterator[str]:
    """`key=value` for every leaf of `new` that differs; ValueError where TOML cannot express it."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            if name not in new:
                raise ValueError(f"{name} is gone")
        for name, value in new.items():
            yield from _settings(old.get(name), value, (*key, name))
        return
    yield f"{'.'.join(map(_part, key))}={_toml(new)}"


def _part(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() else f'"{name}"'


def _toml(value: Any) -> str:
    if value is None:
        raise ValueError("TOML has no null")
    if isinstance(value, dict):
        inner = (f"{_part(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(inner) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _environment(path: Path) -> dict[str, str]:
    try:
        value = read_json(path)
    except ColdstillError:
        return {}
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
