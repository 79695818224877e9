"""What the stages can be told. Each dataclass is one table of the recipe and owns its defaults.

Nothing heavy is imported here, so that reading a recipe never waits for torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from ..data.corpus import Columns
from ..data.errors import ColdstillError

_FORBID: Any = {"extra": "forbid"}

Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConfig:
    """A new model by its sizes."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    family: str = "llama"
    """Any causal language model type of transformers; a size that it does not take is refused."""
    layers: Size
    """Transformer blocks."""
    hidden: Size
    """Width of the residual stream."""
    heads: Size
    """Attention heads; must divide `hidden`. A family without attention has no use for it."""
    kv_heads: Size | None = None
    """Key-value heads; the same as `heads` unless given."""
    feed_forward: Size | None = None
    """Width of the feed-forward layer, and of each expert of a mixture; unless given 8/3 of
    `hidden`, rounded up to 32, or what the family derives from `hidden`."""
    context: Size | None = None
    """Longest input; four sequences of the corpus unless given."""
    tied: bool = True
    """Whether input and output embeddings are one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast a model is trained."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    steps: Size
    """Optimiser steps."""
    batch_tokens: Size = 8192
    """Tokens per optimiser step over all processes, as whole sequences."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-3
    """The highest, at the end of the warm-up."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate climbs."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls afterwards."""
    weight_decay: Weight = 0.1
    """How strongly weights are pulled to zero (AdamW)."""
    gradient_clip: Weight = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    micro_batch_tokens: Size | None = None
    """Tokens per forward pass, all of a step's unless given. Changes memory, not results."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What matrix products are computed in; weights and losses stay fp32."""
    log_every: Size = 10
    """Optimiser steps between lines of metrics.jsonl."""
    checkpoint_every: Size = 200
    """Optimiser steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Whether layers are computed a second time instead of remembered: less memory, more time."""
    compile: bool = False
    """Whether layers run through `torch.compile`: slower to begin with, faster afterwards."""
    seed: int | None = None
    """Of weights and order; the recipe's seed unless given."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further `transformers.TrainingArguments` by name, those that decide something here."""


def _layer_names(value: Any) -> Any:
    """What may stand for a choice of layers; one message for all that may not."""
    names = isinstance(value, list | tuple) and all(isinstance(n, str) and n for n in value)
    if value != "all-linear" and not (names and value):
        raise ValueError(
            f"{value!r} is neither 'all-linear' nor a list of layer names such as "
            "['q_proj', 'v_proj']"
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    """Which layers of the teacher a student is made of, counted from 0: one of these."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    every: Size | None = None
    """Each so-manieth, from the first on."""
    keep: Annotated[int, Field(ge=2)] | None = None
    """So many, evenly spaced, the first and the last among them."""
    only: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Just these, increasing; in a recipe also as a plain list."""

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.every, self.keep, self.only)) != 1:
            raise ValueError(
                "needs one of 'every', 'keep' and a list of layers, such as { every = 2 }, "
                "{ keep = 4 } or [0, 2, 5]"
            )
        if self.only is not None and (not self.only or sorted(set(self.only)) != [*self.only]):
            raise ValueError(
                f"{[*self.only]} is not an increasing list of layers, such as [0, 2, 5]"
            )

    def chosen(self, count: int, where: str) -> list[int]:
        """The places of the kept layers in a teacher of `count` layers.

        Raises
            ColdstillError: it has fewer layers than this asks for
        """
        asked = self.every or self.keep or max(self.only or (0,)) + 1
        if asked > count:
            raise ColdstillError(
                f"{where}: asks for {self._in_words()}, the teacher has {count} layers (0 to "
                f"{count - 1})"
            )
        if self.every is not None:
            return list(range(0, count, self.every))
        if self.keep is not None:
            gaps = self.keep - 1
            return [(2 * place * (count - 1) + gaps) // (2 * gaps) for place in range(self.keep)]
        return list(self.only or ())

    def _in_words(self) -> str:
        if self.every is not None:
            return f"one layer in {self.every}"
        return f"{self.keep} layers" if self.keep is not None else f"layer {max(self.only or (0,))}"


def listed_layers(value: Any) -> Any:
    """A plain list of layers as the table that it is short for."""
    return {"only": value} if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): weights stay frozen, a product of two thin matrices is
    learned beside each and added to it in the end."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    rank: Size = 16
    """Width of the thin matrices."""
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    """The product counts `alpha / rank` times."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of their inputs that is left out in training."""
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_layer_names)] = (
        "all-linear"
    )
    """Linear layers by the end of their names, such as `q_proj`; all but the head unless given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightConfig:
    """A weight that changes over training."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    weight: Weight
    """What it comes to: `linear` in the last step, `wsd` after its warm-up."""
    schedule: Literal["constant", "linear", "wsd"] = "constant"
    """`linear` goes from `start` to `weight` over all steps; `wsd` climbs, stays and decays."""
    start: Weight = 0.0
    """In the first step."""
    end: Weight = 0.0
    """In the last step of `wsd`."""
    warmup: Share = 0.1
    """Share of the steps in which `wsd` goes from `start` to `weight`."""
    decay: Share = 0.01
    """Share of the steps in which it goes from `weight` to `end`."""

    def __post_init__(self) -> None:
        of_wsd = ("end", "warmup", "decay")
        unused = {"constant": ("start", *of_wsd), "linear": of_wsd, "wsd": ()}[self.schedule]
        for key in unused:
            if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                fitting = "'wsd'" if key in of_wsd else "'linear' or 'wsd'"
                raise ValueError(f"{key} belongs to schedule {fitting}, not to '{self.schedule}'")
        if self.warmup + self.decay > 1.0:
            raise ValueError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} are shares of the same "
                "steps, together at most 1"
            )

    @property
    def largest(self) -> float:
        """What it never exceeds, and reaches if there are steps enough."""
        of_wsd = self.schedule == "wsd"
        begun = self.start if self.schedule == "linear" or (of_wsd and self.warmup) else 0.0
        return max(self.weight, begun, self.end if of_wsd and self.decay else 0.0)


def _weight_table(value: Any) -> Any:
    """A plain weight as the table that it is short for."""
    return value if isinstance(value, dict | WeightConfig) else {"weight": value}


def _plain_weight(value: WeightConfig) -> float | WeightConfig:
    """And back, so that a weight that never changes is a number everywhere."""
    return value.weight if value.schedule == "constant" else value


def _as_in_a_recipe(value: float | WeightConfig) -> Any:
    return asdict(value) if isinstance(value, WeightConfig) else value


if TYPE_CHECKING:
    ScheduledWeight = float | WeightConfig
else:  # a recipe's number goes through the table too: one message for a bad weight, wherever it is
    ScheduledWeight = Annotated[
        WeightConfig,
        BeforeValidator(_weight_table),
        AfterValidator(_plain_weight),
        PlainSerializer(_as_in_a_recipe),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What a student is asked to match: a weighted sum of losses. Each weight is a number, or a
    table such as { weight = 0.9, schedule = "wsd" }."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    kl: ScheduledWeight = 1.0
    """Weight of forward KL from the teacher."""
    cross_entropy: ScheduledWeight = 0.0
    """Weight of cross-entropy with the token that really came next."""
    reverse_kl: ScheduledWeight = 0.0
    """Weight of reverse KL. This one and those below need a store with a head."""
    jsd: ScheduledWeight = 0.0
    """Weight of the generalised Jensen-Shannon divergence."""
    total_variation: ScheduledWeight = 0.0
    """Weight of the total variation distance."""
    skew_kl: ScheduledWeight = 0.0
    """Weight of forward KL to a mixture with the teacher; captured temperatures do for a head."""
    skew_reverse_kl: ScheduledWeight = 0.0
    """Weight of reverse KL to a mixture with the student."""
    residual_to_label: ScheduledWeight = 0.0
    """Weight of forward KL from the head, with the mass outside it put on the next token."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Of teacher and student in every loss but cross-entropy; besides 1 the store must have
    captured it."""
    beta: Share | None = None
    """How much the teacher has of the mixture of `jsd`, 1/2 unless given; 0 is forward KL, 1
    reverse."""
    skew: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """How much is mixed in for `skew_kl` and `skew_reverse_kl`, 0.1 unless given."""

    @property
    def parameters(self) -> dict[str, float]:
        """What is given of the losses' parameters, by name."""
        given = {"beta": self.beta, "skew": self.skew}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def weights(self) -> dict[str, WeightConfig]:
        """Loss name to weight, those that ever count."""
        others = {"temperature", "beta", "skew"}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        tables = {
            name: weight if isinstance(weight, WeightConfig) else WeightConfig(weight=weight)
            for name, weight in given.items()
        }
        return {name: weight for name, weight in tables.items() if weight.largest > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """A new byte-pair tokenizer, trained on the corpus."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    vocabulary: Annotated[int, Field(ge=258)] = 8192
    """How many tokens it ends up with: 256 bytes, the end of text, and merges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How a teacher answers prompts, so that students learn from its own text."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    max_new_tokens: Size = 256
    """Most tokens of an answer; it ends earlier at an end token or a full sequence."""
    temperature: Weight = 1.0
    """Of the sampling; 0 always takes the most probable token."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the fewest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample only from so many most probable tokens; 0 for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """What is read, and how it is cut into sequences."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths, globs and folders (relative to the recipe), `hub:ORG/NAME`, or `stdlib:`."""
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """T: most tokens in a sequence; no longer than the models' context."""
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents kept for evaluation, chosen by a hash of their content."""
    separator: str | None = None
    """Put after each plain document: the tokenizer's own end of text unless given; "" for none."""
    pack: bool = True
    """Whether short documents share a sequence (isolated from one another)."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to a row that nothing can be learned from, such as a chat that the template
    cannot render: the first one ends the command, or all are left out and counted by reason."""
    as_chat: bool = False
    """Write prompts and completions with the tokenizer's chat template, as a user's message and an
    assistant's; otherwise they are written one after the other, without any template."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of the records hold what, where the usual names do not."""
