"""The tables of a recipe: every key with its type, default and meaning.

Tables that one stage reads are dataclasses of `stages/config.py`; this file adds the others.
`reading.py` reads a TOML file into them, and `reference.py` makes the recipe reference from the
strings below the fields.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)

from ...data.codecs import CODECS
from ...data.errors import ColdstillError
from ...data.formats import STORES
from ...data.places.cache import byte_count
from ...data.schema import Capture
from ...data.store.manifest import format_settings
from ...stages.config import (
    ArchitectureConfig,
    CorpusConfig,
    InRecipe,
    LayersConfig,
    LoraConfig,
    QuantizeConfig,
    RetokenizeConfig,
    Size,
    TrainConfig,
    listed_layers,
    named_scheme,
)
from ...stages.objective_config import ObjectiveConfig
from ...stages.students.pruning.config import PruneConfig, listed_cuts, plain_cuts
from ...stages.students.rounds.config import RoundsConfig, counted_rounds
from .teacher_table import Table, TeacherTable

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern for the names of runs and students, which are also folder names."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Whole = Annotated[int, Field(ge=0, le=1 << 24)]
Seed = Annotated[int, Field(ge=0, le=1 << 62)]
Bytes = Annotated[
    int, BeforeValidator(byte_count), InRecipe('bytes: an integer, or a string such as "20 GB"')
]
NamedFormat = Annotated[
    str | dict[str, Any], InRecipe("name, or table { name = ..., SETTING = ... }")
]

TEACHER = "teacher"
"""The teacher's name in every comparison; a student cannot have it."""
ORIGINS = ("architecture", "model", "layers", "prune")
"""The keys that give a student its initial weights; each student has exactly one of them."""


class LogitsTable(Table):
    """The store of the teacher's logits: what is stored for each position, where and how."""

    store: NamedFormat = "arrow"
    """File format of the shards: `arrow` or `zarr`, or a table. Both have the setting `zstd`, the
    level of compression: 0 to 22, by default 1; with the codec `plain`, 0 for Arrow and 3 for
    Zarr."""
    codec: NamedFormat = "compact"
    """Codec that turns targets into columns: `compact` (few bytes) or `plain` (exact numbers), or a
    table. `compact` has the setting `levels`, the steps of a probability: 15 to 254, by default
    127."""
    head: Whole = 0
    """How many of the most probable tokens are stored exactly at each position. With the same
    number of bytes, samples alone give a better gradient; a head pays off for `temperatures`."""
    tail: Whole = 50
    """How many tokens are sampled from the rest of the distribution, without bias."""
    temperatures: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = ()
    """Temperatures other than 1 at which students can be trained exactly."""
    sequences: Size | None = None
    """Capture only this many sequences, a seeded sample; all if unset."""
    shard_tokens: Size = 262_144
    """Tokens per shard. A killed run loses at most one shard; a reader verifies shard by shard."""
    batch_tokens: Size = 8192
    """Tokens per forward pass of the teacher."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """Where the store is: an address such as s3://bucket/store, or a folder (relative to the
    recipe). If unset, it is the folder `logits` of the run."""
    cache: Bytes = byte_count("20 GB")
    """Most bytes of remote stores that are cached on this machine."""
    cache_folder: str | None = None
    """Folder of that cache; `$COLDSTILL_CACHE` or `~/.cache/coldstill` if unset."""

    @model_validator(mode="after")
    def _known(self) -> LogitsTable:
        for key, table in (("store", STORES), ("codec", CODECS)):
            value = getattr(self, key)
            name = value.get("name") if isinstance(value, dict) else value
            if not isinstance(name, str) or name not in table:
                raise ValueError(f"{key} = {name!r} is unknown (have: {', '.join(table)})")
        capture = Capture(head=self.head, tail=self.tail, temperatures=self.temperatures)
        try:
            # the vocabulary is not known yet, and no setting depends on it
            format_settings(self.codec, self.store, 1, capture)
        except ColdstillError as error:
            raise ValueError(str(error)) from error
        if self.head == 0 and self.tail == 0:
            raise ValueError("head = 0 and tail = 0 store nothing; set one of them")
        if len(set(self.temperatures)) < len(self.temperatures) or 1.0 in self.temperatures:
            raise ValueError("temperatures must differ from one another and from 1, always kept")
        return self

    @property
    def codec_name(self) -> str:
        """Name of the codec, without its settings."""
        return str(self.codec["name"]) if isinstance(self.codec, dict) else self.codec


class EvaluationTable(Table):
    """The held-out store. It holds more of each distribution, so that figures are precise."""

    head: Size = 128
    """How many of the most probable tokens are stored exactly; at most the vocabulary size."""
    tail: Annotated[int, Field(ge=0)] = 32
    """How many tokens are sampled from the rest of the distribution; 0 for a teacher on a server,
    whose KL and acceptance are then lower bounds."""
    sequences: Size | None = None
    """Evaluate on this many held-out sequences, a seeded sample; all if unset."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """Where the held-out store is: an address or a folder (relative to the recipe). If unset, it is
    the folder `heldout` of the run."""


class ShareTable(Table):
    """One teacher of a student, and its weight in the objective."""

    logits: Annotated[str, Field(min_length=1)] | None = None
    """Store of that teacher: a folder (relative to the recipe), an address such as
    s3://bucket/store, a run's folder or a run's name. If unset, it is the store of this run."""
    weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """Weight of this teacher; its share of the objective is this weight over the sum of weights."""


class StudentTable(Table):
    """One student: its initial weights, its objective and its training."""

    like: str | None = None
    """Another student of the recipe; unset keys are inherited from it."""
    architecture: ArchitectureConfig | None = None
    """Start from a new model of these sizes. A student has exactly one of `architecture`, `model`,
    `layers` and `prune`."""
    model: str | None = None
    """Start from an existing model: a folder or GGUF file (relative to the recipe),
    `package:NAME/PATH` for one inside an installed Python package, or a hub name."""
    trust_remote_code: bool = False
    """Whether Python code that comes with `model` may run on this machine. With `layers` or `prune`
    the teacher's key counts."""
    retokenize: RetokenizeConfig | None = None
    """What is decided if `model` has other tokens than the teacher."""
    layers: Annotated[
        LayersConfig | None, BeforeValidator(listed_layers), InRecipe("list of integers, or table")
    ] = None
    """Start from the teacher with only some of its layers: a list of layers, every n-th layer, or a
    number of evenly spaced layers."""
    prune: Annotated[
        tuple[PruneConfig, ...] | None,
        BeforeValidator(listed_cuts),
        PlainSerializer(plain_cuts),
        InRecipe("table, or list of tables"),
    ] = None
    """Start from the pruned teacher: cut to given sizes or to a number of parameters. With a list
    of tables, each cut is followed by a training, and the next cut starts from its result."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on frozen weights instead of all weights; they are merged into the
    weights at the end."""
    quantize: Annotated[
        QuantizeConfig | None, BeforeValidator(named_scheme), InRecipe("scheme, or table")
    ] = None
    """Train with weights that are rounded to few bits, for exports of the same bits: `int4`,
    `int8`, `int8-row`, or a table. Needs `coldstill[torchao]`."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Losses that the student is trained on, and their weights."""
    teachers: tuple[ShareTable, ...] = ()
    """Further teachers, by their stores of the same sequences. The run's own teacher has the
    weight that is left of 1. If it is listed too (without `logits`), weights can have any sum."""
    train: TrainConfig
    """How the student is trained."""
    rounds: Annotated[
        RoundsConfig | None,
        BeforeValidator(counted_rounds),
        InRecipe("integer at least 1, or table"),
    ] = None
    """Train the student several times, each time but the first also on text that it wrote and that
    the teacher scored. A number is the number of trainings; 1 is the same as unset."""

    @property
    def other_stores(self) -> tuple[str, ...]:
        """Stores of the further teachers, as the recipe names them."""
        return tuple(part.logits for part in self.teachers if part.logits is not None)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each store in the objective, the run's own store first; the sum is 1."""
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
            raise ValueError("teachers: only one entry can lack 'logits': the run's own store")
        if own and not total > 0:
            raise ValueError("teachers: all weights are 0; set at least one above 0")
        if not own and total > 1 + 1e-9:
            raise ValueError(
                f"teachers: the sum of the weights is {total:g}, so the run's own store would have "
                "a negative weight; lower them, or list it too: { weight = ... } without logits"
            )
        if len(set(self.other_stores)) < len(self.other_stores):
            raise ValueError("teachers: the same 'logits' is listed twice; give it one weight")
        if "branches" in self.objective.weights and self.shares[0] < 1:
            raise ValueError(
                "objective: branches is of the run's own teacher alone, and others have a share: "
                "leave it out, or remove 'teachers'"
            )
        return self

    @model_validator(mode="after")
    def _teachable_rounds(self) -> StudentTable:
        if self.rounds is not None:
            self.rounds.learned_with(self.objective)
            if self.other_stores:
                raise ValueError(
                    "rounds: a student of several teachers has none, because each of them would "
                    "have to score its text; remove 'rounds' or 'teachers'"
                )
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> StudentTable:
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            has = f", not both {given[0]!r} and {given[1]!r}" if given else ""
            raise ValueError(f"needs one of 'architecture', 'model', 'layers' and 'prune'{has}")
        for key in ("trust_remote_code", "retokenize"):
            if getattr(self, key) and self.model is None:
                raise ValueError(
                    f"has {key!r} without 'model', which alone it is about; remove it (with "
                    "'layers' and 'prune' the teacher's key counts)"
                )
        if self.lora is not None and self.architecture is not None:
            raise ValueError(
                "has 'lora' with 'architecture': the weights of a new model are random, so "
                "freezing them is useless; remove 'lora', or use 'model', 'layers' or 'prune'"
            )
        if self.lora is not None and self.quantize is not None:
            raise ValueError(
                "has both 'lora' and 'quantize': adapters are added to the weights after the last "
                "step, so they cannot learn from the rounding of the sum; remove one of them"
            )
        return self


class Recipe(Table):
    """The whole recipe: everything that defines a run."""

    name: Name
    """Name of the run, and of its folder below `runs`."""
    seed: Seed = 0
    """Seed of initial weights, of the order of sequences and of all samples."""
    corpus: CorpusConfig
    """Documents to read, and how they are cut into sequences."""
    teacher: TeacherTable
    """The model whose logits are stored."""
    logits: LogitsTable = LogitsTable()
    """The store that students are trained from."""
    evaluation: EvaluationTable = EvaluationTable()
    """The store that students are evaluated on."""
    students: dict[Name, StudentTable] = Field(default_factory=dict)
    """Students by name; any number of them are trained from the same store."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if TEACHER in self.students:
            raise ValueError(f"students: '{TEACHER}' is the teacher; choose another name")
        return self

    @model_validator(mode="after")
    def _no_samples_from_a_server(self) -> Recipe:
        if self.teacher.engine != "server":
            if not self.evaluation.tail:
                raise ValueError(
                    "evaluation.tail: samples make KL and acceptance exact; set it to at least 1"
                )
            return self
        for name, table in (("logits", self.logits), ("evaluation", self.evaluation)):
            if table.tail or not table.head:
                raise ValueError(
                    f"{name}: a server lists the most probable tokens and gives no samples: set "
                    f"{name}.head to at most its --max-logprobs (20 unless it was started with "
                    f"more), and {name}.tail = 0"
                )
        if self.logits.temperatures:
            raise ValueError(
                "logits.temperatures: a server gives probabilities at temperature 1 only; remove "
                "them"
            )
        return self

    @model_validator(mode="after")
    def _texts_or_prompts(self) -> Recipe:
        if self.teacher.generate is None:
            self.corpus.columns.expect_answers()
        elif self.teacher.train is not None:
            raise ValueError(
                "teacher has both 'train', which learns from texts, and 'generate', which answers "
                "prompts; train it in a separate run and name the result as teacher.model"
            )
        return self

    @property
    def trained_teacher(self) -> str:
        """Name of a teacher that is trained in this run, as stores record it."""
        if (base := self.teacher.model) is None:
            return f"teacher of {self.name}"
        return f"{Path(base).name or base} corrected on {self.name}"

    def trusts(self, name: str) -> bool:
        """Whether code that comes with this student's (or the teacher's) model may run."""
        student = self.students.get(name)
        if student is None or student.model is None:
            return self.teacher.trust_remote_code
        return student.trust_remote_code

    def student(self, name: str) -> StudentTable:
        """Return a student by name; raises ColdstillError with the known names."""
        if name not in self.students:
            raise ColdstillError(
                f"{self.name}: no student '{name}' (have: {', '.join(self.students) or 'none'}); a "
                f"variant of one is made with --student {name} --set students.OLD.KEY=VALUE"
            )
        return self.students[name]
