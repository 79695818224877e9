"""The recipe: one TOML file that says everything about a run.

Tables that a stage understands are that stage's own dataclasses (`stages/config.py`); this file
adds the whole around them. An unknown key is an error that names the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..data.cache_settings import byte_count
from ..data.codecs import CODECS
from ..data.errors import ColdstillError
from ..data.files import read_json
from ..data.stores import STORES
from ..stages.config import (
    ArchitectureConfig,
    CorpusConfig,
    ObjectiveConfig,
    Size,
    TokenizerConfig,
    TrainConfig,
)

VERBATIM, RESOLVED = "recipe.toml", "recipe.resolved.json"
"""A run's own copies of its recipe: as it was written, and as it was understood."""

BUILT_IN = Path(__file__).parent / "recipes"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Whole = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, BeforeValidator(byte_count)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherTable(_Table):
    """Who speaks: a model that exists, or one that is made and trained here."""

    model: str | None = None
    """A folder (relative to the recipe) or a hub name."""
    revision: str = "main"
    """Of a hub model: a branch, tag or commit."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What its weights are loaded as; `auto` is what the checkpoint says."""
    attention: str | None = None
    """Any `attn_implementation` of transformers; its own choice unless given."""
    architecture: ArchitectureConfig | None = None
    """Of a model that is made here,"""
    tokenizer: TokenizerConfig | None = None
    """its tokenizer,"""
    train: TrainConfig | None = None
    """and how it is trained."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> TeacherTable:
        made_here = (self.architecture, self.tokenizer, self.train)
        if self.model is not None and any(part is not None for part in made_here):
            raise ValueError(
                "has both 'model' and a table for making one; keep either 'model' or "
                "'architecture', 'tokenizer' and 'train'"
            )
        if self.model is None and any(part is None for part in made_here):
            raise ValueError(
                "needs either 'model' or all of 'architecture', 'tokenizer' and 'train'"
            )
        return self


class LogitsTable(_Table):
    """What is kept of the teacher."""

    store: str | dict[str, Any] = "arrow"
    """How shards lie on disk: a name, or a table of a name and settings."""
    codec: str | dict[str, Any] = "compact"
    """How targets become columns, likewise."""
    head: Whole = 16
    """Most probable tokens kept exactly at each position."""
    tail: Whole = 16
    """Samples of the rest, unbiased."""
    temperatures: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = ()
    """Temperatures besides 1 at which students may be trained exactly."""
    sequences: Size | None = None
    """Capture only so many sequences, a seeded sample; all unless given."""
    shard_tokens: Size = 262_144
    """Tokens per shard: what a killed run loses at most, and what a reader verifies at once."""
    batch_tokens: Size = 8192
    """Tokens per forward pass of the teacher."""
    path: str | None = None
    """Where the store is instead of `logits` in the run: an address such as s3://bucket/store, or a
    folder (relative to the recipe)."""
    cache: Bytes = byte_count("20 GB")
    """How much of stores that have an address is kept on this machine at most."""
    cache_folder: str | None = None
    """Where; `$COLDSTILL_CACHE` or `~/.cache/coldstill` unless given."""

    @model_validator(mode="after")
    def _known(self) -> LogitsTable:
        for key, table in (("store", STORES), ("codec", CODECS)):
            value = getattr(self, key)
            name = value.get("name") if isinstance(value, dict) else value
            if name not in table:
                raise ValueError(f"{key} = {name!r} is unknown (have: {', '.join(table)})")
        if self.head == 0 and self.tail == 0:
            raise ValueError("head = 0 and tail = 0 keep nothing; set one of them")
        if len(set(self.temperatures)) < len(self.temperatures) or 1.0 in self.temperatures:
            raise ValueError("temperatures must differ from one another and from 1, always kept")
        return self

    @property
    def codec_name(self) -> str:
        """The codec without its settings."""
        return str(self.codec["name"]) if isinstance(self.codec, dict) else self.codec


class EvaluationTable(_Table):
    """What is kept of the teacher on held-out documents: more, so that figures are sharp."""

    head: Size = 128
    """Most probable tokens kept exactly, or the whole vocabulary where it is smaller."""
    tail: Size = 32
    """Samples of the rest."""
    sequences: Size | None = None
    """Evaluate on so many held-out sequences; all unless given."""
    path: str | None = None
    """Where this store is instead of `heldout` in the run: an address or a folder, as above."""


class StudentTable(_Table):
    """One student."""

    like: str | None = None
    """Another student of the recipe whose settings are taken where this one says nothing."""
    architecture: ArchitectureConfig | None = None
    """A new model of these sizes, or"""
    model: str | None = None
    """a folder (relative to the recipe) or hub name to start from."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What it is asked to match."""
    train: TrainConfig
    """How long and how fast."""

    @model_validator(mode="after")
    def _one_origin(self) -> StudentTable:
        if (self.architecture is None) == (self.model is None):
            raise ValueError("needs either 'architecture' or 'model'")
        return self


class Recipe(_Table):
    """Everything about a run."""

    name: Name
    """Of the run: its folder below `runs`."""
    seed: Whole = 0
    """Of weights, orders and samples."""
    corpus: CorpusConfig
    """What is read."""
    teacher: TeacherTable
    """Who speaks."""
    logits: LogitsTable = LogitsTable()
    """What is kept of it."""
    evaluation: EvaluationTable = EvaluationTable()
    """What is kept of it on held-out documents."""
    students: dict[Name, StudentTable] = Field(default_factory=dict)
    """Who listens, by name: any number, all from the same store."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if "teacher" in self.students:
            raise ValueError("students: 'teacher' is the teacher's name in every table")
        return self

    def student(self, name: str) -> StudentTable:
        """One of its students; raises ColdstillError naming those there are."""
        if name not in self.students:
            raise ColdstillError(
                f"{self.name}: no student '{name}' (have: {', '.join(self.students) or 'none'}); a "
                f"variant of one is made with --student {name} --set students.OLD.KEY=VALUE"
            )
        return self.students[name]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and where it came from."""

    recipe: Recipe
    base: Path
    """What its relative paths start from."""
    text: str
    """The file as it was written."""


def load_recipe(
    name: str, settings: tuple[str, ...] = (), student: str | None = None, runs: Path = Path("runs")
) -> LoadedRecipe:
    """Load a recipe by the name of a built-in one, its file, or a run's folder.

    settings  `section.key=value` overrides, values in TOML (a bare word is a string)
    student   a name that the recipe lacks becomes a variant of the one student that `settings`
              change; that student itself stays as it was

    Raises
        ColdstillError: no such recipe, not TOML, unknown keys, bad values
    """
    path, base = _locate(name, runs)
    if path.name == RESOLVED:
        stored, source = read_json(path), path.with_name(VERBATIM)
        match stored:
            case {"recipe": dict() as table, "base": str() as folder}:
                base = Path(folder)
            case _:
                raise ColdstillError(f"{path}: not what a run writes; pass its recipe file instead")
        text = _read(source if source.exists() else path)
    else:
        text = _read(path)
        try:
            table = tomllib.loads(text.removeprefix("\ufeff"))
        except tomllib.TOMLDecodeError as error:
            raise ColdstillError(f"{path}: not valid TOML: {error}") from error
    original = json.loads(json.dumps(table))
    for setting in settings:
        _set(table, setting)
    _make_variant(original, table, settings, student)
    _resolve_likeness(table, str(path))
    try:
        return LoadedRecipe(Recipe.model_validate(table), base, text)
    except ValidationError as error:
        raise ColdstillError(_explain(error, str(path))) from error


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
        f"{name}: no recipe file, no run folder and no built-in recipe of that name (built in: "
        f"{have}); write one with coldstill init NAME"
    )


def _read(path: Path) -> str:
    try:  # not read_text, which would change line endings
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ColdstillError(
            f"{path}: byte {error.start} is not valid UTF-8, so this is no recipe"
        ) from error


def _set(table: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key.strip()):
        raise ColdstillError(f"--set {setting}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *path, last = key.strip().split(".")
    place = table
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ColdstillError(f"--set {setting}: '{part}' is a value, not a table")
    place[last] = value


def _make_variant(
    original: dict[str, Any], table: dict[str, Any], settings: tuple[str, ...], student: str | None
) -> None:
    students = table.get("students", {})
    if student is None or not isinstance(students, dict) or student in students:
        return
    changed = {s.split(".")[1] for s in settings if re.match(r"students\.[^.=]+\.", s)}
    if len(changed) == 1:
        base, before = changed.pop(), original.get("students", {})
        if base not in before:
            raise ColdstillError(
                f"--set students.{base}: no student '{base}' to make '{student}' of (have: "
                f"{', '.join(before) or 'none'})"
            )
        students[student], students[base] = students[base], before[base]


def _resolve_likeness(table: dict[str, Any], where: str) -> None:
    """Fill in what a student takes over from another."""
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
                else f"{where}: students.{name}.like goes round in a circle: {chain}"
            )
        if own.get("like") is None:
            return own
        base = dict(resolved(str(own["like"]), (*seen, name)))
        for origin, other in (("model", "architecture"), ("architecture", "model")):
            if origin in own:
                base.pop(other, None)
        return _merged(base, own)

    whole = {name: resolved(name, ()) for name in students if isinstance(students[name], dict)}
    for name, student in whole.items():
        students[name] = {key: value for key, value in student.items() if key != "like"}


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(error: ValidationError, where: str) -> str:
    """The first mistake, as one line that says what to do."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    mistakes = error.errors(include_url=False)
    # a misspelled key is also a missing one: tell the cause
    first = next((mistake for mistake in mistakes if mistake["type"] in unknown), mistakes[0])
    place = [str(part) for part in first["loc"]]
    if first["type"] in unknown:
        section, key = ".".join(place[:-1]), place[-1]
        known = _keys_at(place[:-1])
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        return (
            f"{where}: {section or 'recipe'}: unknown key '{key}'{guess} (have: {', '.join(known)})"
        )
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: {'.'.join(place)}: missing, and it has no default"
    if first["type"] == "value_error":
        return f"{where}: {'.'.join(place)}: {first['ctx']['error']!s}"
    value = repr(first["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {'.'.join(place)}: {message}, not {shown}"


def _keys_at(place: list[str]) -> list[str]:
    """The keys of the table at `place`."""
    kind: Any = Recipe
    for part in place:
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind)[part]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(k for k in get_args(kind) if k is not type(None))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)]
