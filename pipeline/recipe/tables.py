"""What a recipe may say: its tables, with every key's default and meaning.

Tables that a stage understands are that stage's own dataclasses (`stages/config.py`); this file
adds the whole around them. `pipeline/recipe/reading.py` reads a TOML file into them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from ...data.codecs import CODECS
from ...data.errors import ColdstillError
from ...data.formats import STORES
from ...data.places.cache_settings import byte_count
from ...data.schema import Capture
from ...data.store.manifest import format_settings
from ...stages.config import (
    ArchitectureConfig,
    CorpusConfig,
    GenerateConfig,
    LayersConfig,
    LoraConfig,
    ObjectiveConfig,
    Size,
    TokenizerConfig,
    TrainConfig,
    listed_layers,
)
from ...stages.students.pruning.config import PruneConfig, listed_cuts, plain_cuts

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of runs and students: what may be a folder's name anywhere."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Whole = Annotated[int, Field(ge=0, le=1 << 24)]
Seed = Annotated[int, Field(ge=0, le=1 << 62)]
Bytes = Annotated[int, BeforeValidator(byte_count)]

TEACHER = "teacher"
"""What the teacher is called in every table, so no student may be."""
ORIGINS = ("architecture", "model", "layers", "prune")
"""Where a student's first weights come from: one of these keys."""


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
    trust_remote_code: bool = False
    """Whether Python code that `model` brings (`auto_map` in its files) may run on this machine.
    Read it first; the store's manifest records it."""
    compile: bool = False
    """Run it through `torch.compile`: slower to begin with, faster afterwards."""
    device_map: str | dict[str, int | str] | None = None
    """Spread it over several devices, as transformers does: `auto`, or a device for each part."""
    tensor_parallel: bool = False
    """Cut every layer into slices, one for each process of a `torchrun`."""
    architecture: ArchitectureConfig | None = None
    """Of a model that is made here,"""
    tokenizer: TokenizerConfig | None = None
    """its tokenizer,"""
    train: TrainConfig | None = None
    """and how it is trained; with `model`, how that one is corrected: fine-tuned on the corpus
    before it is asked."""
    lora: LoraConfig | None = None
    """Correct it by adapters on frozen weights instead of all its weights."""
    generate: GenerateConfig | None = None
    """It answers the corpus's prompts itself, and students learn from its answers."""

    @property
    def is_trained_here(self) -> bool:
        """Whether what speaks is made by training, from nothing or from `model`."""
        return self.train is not None

    @model_validator(mode="after")
    def _one_place(self) -> TeacherTable:
        if self.tensor_parallel and self.device_map is not None:
            raise ValueError(
                "has both 'tensor_parallel' and 'device_map'; keep the one that fits: "
                "several processes in step, or one process with several devices"
            )
        if self.tensor_parallel and self.generate is not None:
            raise ValueError(
                "has both 'tensor_parallel' and 'generate'; spread a teacher that answers by "
                "'device_map'"
            )
        return self

    @model_validator(mode="after")
    def _one_or_the_other(self) -> TeacherTable:
        made_here = (self.architecture, self.tokenizer)
        if self.model is not None and any(part is not None for part in made_here):
            raise ValueError(
                "has both 'model' and a table for making one; keep either 'model' (and 'train', to "
                "correct it) or 'architecture', 'tokenizer' and 'train'"
            )
        if self.model is None and self.trust_remote_code:
            raise ValueError(
                "has 'trust_remote_code' without 'model': a model that is made here brings no "
                "code; remove it"
            )
        if self.model is None and self.lora is not None:
            raise ValueError(
                "has 'lora' without 'model': a model that is made here has no weights worth "
                "freezing; remove 'lora'"
            )
        if self.model is None and any(part is None for part in (*made_here, self.train)):
            raise ValueError(
                "needs either 'model' or all of 'architecture', 'tokenizer' and 'train'"
            )
        if self.lora is not None and self.train is None:
            raise ValueError(
                "has 'lora' without 'train': say how long it is trained, such as train = "
                "{ steps = 100 }, or remove 'lora'"
            )
        return self


class LogitsTable(_Table):
    """What is kept of the teacher."""

    store: str | dict[str, Any] = "arrow"
    """How shards lie on disk: a name, or a table of a name and settings."""
    codec: str | dict[str, Any] = "compact"
    """How targets become columns, likewise."""
    head: Whole = 0
    """Most probable tokens kept exactly at each position. At the same bytes samples alone give a
    better gradient; a head pays where `temperatures` are wanted."""
    tail: Whole = 50
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


class ShareTable(_Table):
    """A teacher that a student listens to, and how much."""

    logits: Annotated[str, Field(min_length=1)] | None = None
    """Its store: a folder (relative to the recipe), an address such as s3://bucket/store, a run's
    folder or a run's name; the run's own store unless given."""
    weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """What part of the objective it has, of the sum of all."""


class StudentTable(_Table):
    """One student."""

    like: str | None = None
    """Another student of the recipe whose settings are taken where this one says nothing."""
    architecture: ArchitectureConfig | None = None
    """A new model of these sizes, or"""
    model: str | None = None
    """a folder (relative to the recipe) or hub name to start from, or"""
    trust_remote_code: bool = False
    """Whether Python code that `model` brings may run on this machine; what is made of the
    teacher has the teacher's key."""
    layers: Annotated[LayersConfig | None, BeforeValidator(listed_layers)] = None
    """the teacher with only these of its layers: a list, or `every` so-manieth, or so many to
    `keep`, or"""
    prune: Annotated[
        tuple[PruneConfig, ...] | None,
        BeforeValidator(listed_cuts),
        PlainSerializer(plain_cuts),
    ] = None
    """the teacher cut down: to sizes, or to a number of parameters. A list of tables cuts and
    trains, cuts what was trained, and so on."""
    lora: LoraConfig | None = None
    """Train adapters on frozen weights instead of all weights; they are merged in the end."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What it is asked to match."""
    teachers: tuple[ShareTable, ...] = ()
    """Further teachers, by their stores of the same sequences. The run's own has what their weights
    leave of 1, unless it is listed too (without `logits`); then the weights may have any sum."""
    train: TrainConfig
    """How long and how fast."""

    @property
    def other_stores(self) -> tuple[str, ...]:
        """The further teachers' stores, as the recipe names them."""
        return tuple(part.logits for part in self.teachers if part.logits is not None)

    @property
    def shares(self) -> tuple[float, ...]:
        """What part of the objective each store has, the run's own first; their sum is 1."""
        others = [part.weight for part in self.teachers if part.logits is not None]
        listed = [part.weight for part in self.teachers if part.logits is None]
        left = 1.0 - math.fsum(others)
        own = listed[0] if listed else left if left > 1e-9 else 0.0
        total = math.fsum((own, *others))
        return tuple(weight / total for weight in (own, *others))

    @model_validator(mode="after")
    def _teachers_add_up(self) -> StudentTable:
        own = [part for part in self.teachers if part.logits is None]
        total = math.fsum(part.weight for part in self.teachers)
        if len(own) > 1:
            raise ValueError("teachers: only one can lack 'logits', which is the run's own store")
        if own and not total > 0:
            raise ValueError("teachers: all weights are 0, so there is nobody to listen to")
        if not own and total > 1 + 1e-9:
            raise ValueError(
                f"teachers: the weights' sum is {total:g}, which leaves the run's own store less "
                "than nothing; lower them, or list it too: { weight = ... } without logits"
            )
        if len(set(self.other_stores)) < len(self.other_stores):
            raise ValueError("teachers: the same 'logits' twice; give that store one weight")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> StudentTable:
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            has = f", not both {given[0]!r} and {given[1]!r}" if given else ""
            raise ValueError(f"needs one of 'architecture', 'model', 'layers' and 'prune'{has}")
        if self.trust_remote_code and self.model is None:
            raise ValueError(
                "has 'trust_remote_code' without 'model', whose code it would allow; remove it "
                "(for 'layers' and 'prune' the teacher's key counts)"
            )
        if self.lora is not None and self.architecture is not None:
            raise ValueError(
                "has 'lora' with 'architecture': a new model has no weights worth freezing; remove "
                "'lora', or start from 'model', 'layers' or 'prune'"
            )
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
        if TEACHER in self.students:
            raise ValueError(f"students: '{TEACHER}' is the teacher's name in every table")
        return self

    @model_validator(mode="after")
    def _texts_or_prompts(self) -> Recipe:
        if self.teacher.generate is None:
            self.corpus.columns.expect_answers()
        elif self.teacher.train is not None:
            raise ValueError(
                "teacher has both 'train', which learns from texts, and 'generate', which answers "
                "prompts; train it in a run of its own and name the result as teacher.model"
            )
        return self

    @property
    def trained_teacher(self) -> str:
        """What stores call a teacher that is trained here."""
        base = self.teacher.model
        if base is None:
            return f"teacher of {self.name}"
        return f"{Path(base).name or base} corrected on {self.name}"

    def trusts(self, name: str) -> bool:
        """Whether code that this student, or the teacher, brings may run."""
        student = self.students.get(name)
        if student is None or student.model is None:
            return self.teacher.trust_remote_code
        return student.trust_remote_code

    def student(self, name: str) -> StudentTable:
        """One of its students; raises ColdstillError naming those there are."""
        if name not in self.students:
            raise ColdstillError(
                f"{self.name}: no student '{name}' (have: {', '.join(self.students) or 'none'}); a "
                f"variant of one is made with --student {name} --set students.OLD.KEY=VALUE"
            )
        return self.students[name]
