"""What the stages can be told. Each dataclass is one table of the recipe and owns its defaults.

Nothing heavy is imported here, so that reading a recipe never waits for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..data.corpus import Columns

_FORBID: Any = {"extra": "forbid"}

Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConfig:
    """A new model by its sizes."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    family: str = "llama"
    """Any causal language model type of transformers that has the usual sizes."""
    layers: Size
    """Transformer blocks."""
    hidden: Size
    """Width of the residual stream."""
    heads: Size
    """Attention heads; must divide `hidden`."""
    kv_heads: Size | None = None
    """Key-value heads; the same as `heads` unless given."""
    feed_forward: Size | None = None
    """Width of the feed-forward layer; 8/3 of `hidden`, rounded up to 32, unless given."""
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
    seed: int | None = None
    """Of weights and order; the recipe's seed unless given."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any further `transformers.TrainingArguments`, by name."""


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
class ObjectiveConfig:
    """What a student is asked to match: a weighted sum."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    kl: Weight = 1.0
    """Weight of forward KL from the teacher."""
    cross_entropy: Weight = 0.0
    """Weight of cross-entropy with the token that really came next."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Of the KL on both sides; besides 1 the store must have captured it."""

    @property
    def weights(self) -> dict[str, float]:
        """Loss name to weight, those that count."""
        weights = {"kl": self.kl, "cross_entropy": self.cross_entropy}
        return {name: weight for name, weight in weights.items() if weight > 0}


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
    """What becomes of a chat that the template cannot render and of a prompt that leaves no room
    for its answer: the first one ends the command, or all are left out and counted."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of the records hold what, where the usual names do not."""
