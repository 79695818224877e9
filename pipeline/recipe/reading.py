"""Reads a recipe from its file or from a run, with `--set` overrides and variants of students."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.errors import ColdstillError
from ...data.files import read_json
from .reference import names_at
from .tables import ORIGINS, Recipe

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


VERBATIM, RESOLVED = "recipe.toml", "recipe.resolved.json"
"""A run's copies of its recipe: the file as written, and the validated values."""

BYTE_ORDER_MARK = "\ufeff"
"""Some editors put it at the start of a file; it is not part of the TOML."""

BUILT_IN = Path(__file__).parents[1] / "recipes"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A validated recipe and its origin."""

    recipe: Recipe
    base: Path
    """Folder that relative paths in the recipe start from."""
    text: str
    """The file as it was written."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeSource:
    """A recipe that is read but not validated; `like` of students is not resolved yet."""

    table: dict[str, Any]
    base: Path
    """Folder that relative paths in the recipe start from."""
    text: str
    """The file as it was written."""
    where: str
    """Name of the recipe in messages."""

    def validated(self) -> LoadedRecipe:
        """Validate the recipe; raises ColdstillError for unknown keys and wrong values."""
        table = copy.deepcopy(self.table)
        _resolve_likeness(table, self.where)
        try:
            return LoadedRecipe(Recipe.model_validate(table), self.base, self.text)
        except ValidationError as error:
            raise ColdstillError(_explain(error, self.where, table)) from error


def load_recipe(
    name: str, settings: Sequence[str] = (), student: str | None = None, runs: Path = Path("runs")
) -> LoadedRecipe:
    """Load a recipe by the name of a built-in recipe, by its file, or by a run's folder.

    settings  overrides `section.key=value`; values are TOML, a bare word is a string
    student   an unknown name becomes a variant of the one student that `settings` change; that
              student itself stays unchanged
    runs      folder that holds the runs

    Raises
        ColdstillError: no such recipe, invalid TOML, unknown keys, wrong values
    """
    return read_source(name, settings, student, runs).validated()


def read_source(
    name: str, settings: Sequence[str] = (), student: str | None = None, runs: Path = Path("runs")
) -> RecipeSource:
    """Read a recipe without validating it; parameters and errors as `load_recipe`."""
    path, base = _locate(name, runs)
    if path.name == RESOLVED:
        stored, source = read_json(path), path.with_name(VERBATIM)
        match stored:
            case {"recipe": dict() as table, "base": str() as folder}:
                base = Path(folder)
            case _:
                raise ColdstillError(f"{path}: not written by a run; pass its recipe file instead")
        text = read_text(source if source.exists() else path)
    else:
        text = read_text(path)
        try:
            table = tomllib.loads(text.removeprefix(BYTE_ORDER_MARK))
        except tomllib.TOMLDecodeError as error:
            raise ColdstillError(f"{path}: not valid TOML: {error}") from error
    original = copy.deepcopy(table)
    keys = [_set(table, setting) for setting in settings]
    _expect_known_students(original, table)
    _make_variant(original, table, keys, student)
    return RecipeSource(table, base, text, str(path))


def run_folder(name: str, runs: Path) -> Path | None:
    """Return the run's folder that a name on the command line means, or None for a recipe.

    Raises
        ColdstillError: neither a run nor a recipe has this name
    """
    path, _ = _locate(name, runs)
    return path.parent if path.name == RESOLVED else None


def _locate(name: str, runs: Path) -> tuple[Path, Path]:
    path = Path(name)
    if path.is_file():
        return path, path.resolve().parent
    if (path / RESOLVED).is_file():
        return path / RESOLVED, path
    beside = Path(f"{name}.toml")
    if beside.is_file():
        return beside, beside.resolve().parent
    built_in = BUILT_IN / f"{name}.toml"
    if built_in.is_file():
        return built_in, Path.cwd()
    if (runs / name / RESOLVED).is_file():
        return runs / name / RESOLVED, runs / name
    if path.is_dir():
        raise ColdstillError(f"{name}: a folder without {RESOLVED}, so not a run")
    have = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.toml")))
    raise ColdstillError(
        f"{name}: no recipe file, no run folder and no built-in recipe has this name (built in: "
        f"{have}); write one with coldstill init NAME"
    )


def read_text(path: Path) -> str:
    """Return a recipe file's text with its own line endings; raises ColdstillError unless UTF-8."""
    try:  # not read_text, which would change line endings
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ColdstillError(
            f"{path}: byte {error.start} is not valid UTF-8, so this is not a recipe"
        ) from error


_PART = r'(?:[A-Za-z0-9_-]+|"[^"]+")'


def split_key(text: str, students: Collection[str]) -> list[str] | None:
    """Return the parts of a dotted key, or None if the text is not a dotted key.

    students  known names; the name of a sweep's point can itself contain dots
    """
    text = text.strip()
    below = text.removeprefix("students.")
    if below != text:
        begun = [name for name in students if f"{below}.".startswith(f"{name}.")]
        if begun:
            name = max(begun, key=len)
            rest = split_key(below[len(name) + 1 :], ()) if below != name else []
            return None if rest is None else ["students", name, *rest]
    if not re.fullmatch(rf"{_PART}(\.{_PART})*", text):
        return None
    return [part.strip('"') for part in re.findall(_PART, text)]


def toml_value(text: str) -> Any:
    """Parse a TOML value; a bare word is a string."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return found["value"] if found.keys() == {"value"} else text.strip()


def set_value(table: dict[str, Any], key: list[str], value: Any, where: str) -> None:
    """Set a key of nested tables; missing tables are created.

    Raises
        ColdstillError: a part of the key is a value that is not a table
    """
    *path, last = key
    place = table
    for part in path:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ColdstillError(f"{where}: '{part}' is a value, not a table")
    place[last] = value


def _set(table: dict[str, Any], setting: str) -> list[str]:
    """Override a key, and return it."""
    text, equals, value = setting.partition("=")
    students = table.get("students")
    key = split_key(text, students if isinstance(students, dict) else ()) if equals else None
    if key is None:
        raise ColdstillError(f"--set {setting}: expected section.key=value")
    set_value(table, key, toml_value(value), f"--set {setting}")
    return key


def _expect_known_students(original: dict[str, Any], table: dict[str, Any]) -> None:
    """Refuse overrides of a student that the recipe lacks, unless they define a new student."""
    before, students = original.get("students", {}), table.get("students", {})
    if not isinstance(before, dict) or not isinstance(students, dict):
        return
    for name, own in students.items():
        if name not in before and isinstance(own, dict) and not own.keys() & {"like", *ORIGINS}:
            near = difflib.get_close_matches(name, before, 1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            raise ColdstillError(
                f"--set students.{name}: no student '{name}'{guess} (have: "
                f"{', '.join(before) or 'none'}; a new student needs 'like' or one of "
                f"{', '.join(map(repr, ORIGINS))})"
            )


def _make_variant(
    original: dict[str, Any], table: dict[str, Any], keys: list[list[str]], student: str | None
) -> None:
    students = table.get("students", {})
    if student is None or not isinstance(students, dict) or student in students:
        return
    changed = {key[1] for key in keys if key[0] == "students" and len(key) > 2}
    if len(changed) == 1:
        base, before = changed.pop(), original.get("students", {})
        if base not in before:
            raise ColdstillError(
                f"--set students.{base}: no student '{base}' to make '{student}' from (have: "
                f"{', '.join(before) or 'none'})"
            )
        students[student], students[base] = students[base], before[base]


def _resolve_likeness(table: dict[str, Any], where: str) -> None:
    """Fill in the keys that students inherit by `like`."""
    students = table.get("students")
    if not isinstance(students, dict):
        return

    def resolved(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
        own = students.get(name)
        if name in seen or not isinstance(own, dict):
            chain = " -> ".join((*seen, name))
            raise ColdstillError(
                f"{where}: students.{seen[-1]}.like: no student '{name}'"
                if name not in seen
                else f"{where}: students.{name}.like is circular: {chain}"
            )
        if own.get("like") is None:
            return own
        base = dict(resolved(str(own["like"]), (*seen, name)))
        return _merged(_without_its_origin(base, own), own)

    whole = {name: resolved(name, ()) for name in students if isinstance(students[name], dict)}
    for name, student in whole.items():
        students[name] = {key: value for key, value in student.items() if key != "like"}


def _without_its_origin(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the inherited keys of a student that has its own origin."""
    own_origins = [origin for origin in ORIGINS if own.get(origin) is not None]
    if not own_origins:
        return base
    # single sizes of an architecture are inherited; layers and prune are replaced as a whole
    gone = {
        origin for origin in ORIGINS if origin not in own_origins or origin in ("layers", "prune")
    }
    gone.add("trust_remote_code")  # it was set for the other student's model
    if "architecture" in own_origins:
        gone.add("lora")
    return {key: value for key, value in base.items() if key not in gone}


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(error: ValidationError, where: str, table: dict[str, Any]) -> str:
    """Return one line about the first mistake, with the remedy."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    mistakes = error.errors(include_url=False)
    # a misspelled key is also a missing key, so unknown keys come first
    first = next((mistake for mistake in mistakes if mistake["type"] in unknown), mistakes[0])
    place = _as_written(first["loc"], table)
    if first["type"] in unknown:
        section, key = ".".join(place[:-1]), place[-1]
        known = names_at([str(part) for part in first["loc"][:-1]])
        begun = [name for name in known if name.startswith(key)]
        near = begun or difflib.get_close_matches(key, known, 1, cutoff=0.5)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        return (
            f"{where}: {section or 'recipe'}: unknown key '{key}'{guess} (have: {', '.join(known)})"
        )
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: {'.'.join(place)}: missing, and it has no default"
    if first["type"] == "value_error":
        return ": ".join(filter(None, (where, ".".join(place), str(first["ctx"]["error"]))))
    value = repr(first["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {'.'.join(place)}: {message}, not {shown}"


def _as_written(place: tuple[str | int, ...], table: Any) -> list[str]:
    """Return a place in the recipe; a table that stands for a list of one has no index."""
    parts, value = [], table
    for part in place:
        if isinstance(part, int) and isinstance(value, dict):
            continue
        parts.append(str(part))
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return parts
