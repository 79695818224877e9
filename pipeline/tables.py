"""What a recipe may say: its tables, with every key's default and meaning.

Tables that a stage understands are that stage's own dataclasses (`stages/config.py`); this file
adds the whole around them. `pipeline/recipe.py` reads a TOML file into them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..data.cache_settings import byte_count
from ..data.codecs import CODECS
from ..data.errors import ColdstillError
from ..data.manifest import format_settings
from ..data.schema import Capture
from ..data.stores import STORES
from ..stages.config import (
    ArchitectureConfig,
    CorpusConfig,
    ObjectiveConfig,
    Size,
    TokenizerConfig,
    TrainConfig,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Whole = Annotated[int, Field(ge=0, le=1 << 24)]
Seed = Annotated[int, Field(ge=0, le=1 << 62)]
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
    path: Annotated[str, Field(min_length=1)] | None = None
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
            if not isinstance(name, str) or name not in table:
                raise ValueError(f"{key} = {name!r} is unknown (have: {', '.join(table)})")
        capture = Capture(head=self.head, tail=self.tail, temperatures=self.temperatures)
        try:
            # the vocabulary is not known yet; no setting depends on it
            format_settings(self.codec, self.store, 1, capture)
        except ColdstillError as error:
            raise ValueError(str(error)) from error
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
    path: Annotated[str, Field(min_length=1)] | None = None
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
    seed: Seed = 0
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
