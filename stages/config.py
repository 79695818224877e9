"""Settings of the stages. Each dataclass is one table of the recipe and defines its defaults.

The string below a field is its meaning in the recipe reference. Nothing heavy is imported here, so
that reading a recipe does not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..data.corpus.columns import Columns
from ..data.errors import ColdstillError

Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
SERVER_KEY = "COLDSTILL_SERVER_KEY"
"""Environment variable with the key that a server may ask for."""


def sequences_in(batch_tokens: int, sequence_length: int) -> int:
    """Sequences of a batch: whole ones, and at least one."""
    return max(1, batch_tokens // sequence_length)


@dataclass(frozen=True, slots=True)
class InRecipe:
    """What a recipe accepts for a key, where that is more than the key's type in Python."""

    text: str


class ConfigTable:
    """A table in which unknown keys are refused."""

    __slots__ = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConfig(ConfigTable):
    """Sizes of a new model."""

    family: str = "llama"
    """Model type of transformers: any causal language model. A size that it lacks is refused."""
    layers: Size
    """Number of transformer blocks."""
    hidden: Size
    """Width of the residual stream."""
    heads: Size
    """Number of attention heads; must divide `hidden`. Families without attention ignore it."""
    kv_heads: Size | None = None
    """Number of key-value heads; equal to `heads` if unset."""
    feed_forward: Size | None = None
    """Width of the feed-forward layer, and of each expert in a mixture of experts. If unset, it is
    8/3 of `hidden`, rounded up to 32, or the family's own rule."""
    context: Size | None = None
    """Longest input in tokens; four times `corpus.sequence_length` if unset."""
    tied: bool = True
    """Whether input and output embeddings are one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(ConfigTable):
    """How a model is trained: steps, batches, learning rate, precision, checkpoints."""

    steps: Size
    """Number of optimiser steps."""
    batch_tokens: Size = 8192
    """Tokens per optimiser step over all processes, as whole sequences."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate increases from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate decreases after the warm-up."""
    weight_decay: Weight = 0.1
    """Weight decay of AdamW."""
    gradient_clip: Weight = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    micro_batch_tokens: Size | None = None
    """Tokens per forward pass; all tokens of a step if unset. Changes memory, not results."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; weights and losses stay fp32."""
    log_every: Size = 10
    """Optimiser steps between two lines of metrics.jsonl."""
    checkpoint_every: Size = 200
    """Optimiser steps between two checkpoints."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass: less memory, more time."""
    compile: bool = False
    """Whether layers run through `torch.compile`: a slower start, then faster steps."""
    seed: int | None = None
    """Seed of initial weights and of the order of sequences; the recipe's `seed` if unset."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further settings of `transformers.TrainingArguments` by name. Settings without an effect here
    are refused."""


def _layer_names(value: Any) -> Any:
    """Check `targets`; one message covers all wrong values."""
    names = isinstance(value, list | tuple) and all(isinstance(n, str) and n for n in value)
    if value != "all-linear" and not (names and value):
        raise ValueError(
            f"{value!r} is neither 'all-linear' nor a list of layer names such as "
            "['q_proj', 'v_proj']"
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig(ConfigTable):
    """Which layers of the teacher a student keeps, counted from 0. Exactly one key is set."""

    every: Size | None = None
    """Keep every n-th layer, starting with the first."""
    keep: Annotated[int, Field(ge=2)] | None = None
    """Keep this many layers, evenly spaced, including the first and the last."""
    only: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Keep exactly these layers, in increasing order. A plain list in place of the table means the
    same."""

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
        """Return the kept layers of a teacher that has `count` layers; refuse too few."""
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
    """Return the table that a plain list of layers stands for."""
    return {"only": value} if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(ConfigTable):
    """Low-rank adapters (LoRA, arXiv 2106.09685). Weights stay frozen; a product of two thin
    matrices is trained for each weight matrix and added to it at the end."""

    rank: Size = 16
    """Rank of the adapters: width of the thin matrices."""
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    """The product of the thin matrices is multiplied by `alpha / rank`."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the adapters' inputs that is dropped during training."""
    targets: Annotated[
        Literal["all-linear"] | tuple[str, ...],
        BeforeValidator(_layer_names),
        InRecipe('"all-linear", or list of strings'),
    ] = "all-linear"
    """Linear layers that get adapters, by the end of their names, such as `q_proj`; by default all
    linear layers except the output head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig(ConfigTable):
    """Training with rounded weights (quantisation-aware training), for a format of few bits. A
    plain scheme in place of the table means the same."""

    scheme: Literal["int4", "int4-dynamic", "int8", "int8-dynamic", "int8-row"]
    """`int4` for the export `gguf-q4_0`: 4 bits, the output head 8. `int8` for `gguf-q8_0` and
    `onnx-int8`. Both have a scale for every 32 inputs; `-dynamic` also rounds the inputs of layers
    to 8 bits, as these runtimes do. `int8-row` for `torchao-int8`: a scale for each row."""
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the steps before rounding begins."""


def named_scheme(value: Any) -> Any:
    """Return the table that a plain name of a scheme stands for."""
    return {"scheme": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class RetokenizeConfig(ConfigTable):
    """What is decided where the tokens of a student's `model` and those of the teacher do not
    agree. The student then learns from a store that is written again in its tokens."""

    ambiguous: Literal["split", "map", "bucket"] = "split"
    """Probability of a teacher's token that may be the beginning of a longer token of the student:
    `split` shares it out as the texts of the store go on, `map` gives it to the student's token for
    its bytes, `bucket` leaves it in the bucket of a store without samples (`logits.tail = 0`)."""
    unaligned: Literal["refuse", "skip"] = "refuse"
    """Texts that the student's tokenizer does not reproduce byte by byte: `refuse` ends the command
    at the first one, `skip` learns nothing of them."""
    special: dict[str, str] = field(default_factory=dict)
    """What the student reads for special tokens of the teacher, by their names; by default its own
    token for the same purpose or with the same name."""
    branches: Annotated[float, Field(ge=0.0, le=4.0)] = 0.25
    """Most words beside the text, for each token of a sequence, that the store keeps for the loss
    `branches`; 0 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig(ConfigTable):
    """A new byte-pair tokenizer, trained on the corpus."""

    vocabulary: Annotated[int, Field(ge=258)] = 8192
    """Number of tokens: 256 bytes, the end of text, and merges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(ConfigTable):
    """How the teacher answers prompts; students learn from the answers."""

    max_new_tokens: Size = 256
    """Most tokens of an answer. It ends earlier at an end token or when the sequence is full."""
    temperature: Weight = 1.0
    """Sampling temperature; 0 always takes the most probable token."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the smallest set of tokens that has this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample only from this many most probable tokens; 0 means all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions(ConfigTable):
    """`teacher.engine_options` of a server."""

    model: str = ""
    """The name under which the server has the teacher; not needed if it serves one model."""
    requests: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most requests that are sent at the same time."""
    timeout: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 600.0
    """Longest time of one request, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig(ConfigTable):
    """The documents that are read, and how they are cut into sequences."""

    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, globs and folders (relative to the recipe), `package:NAME/PATH` for one inside an
    installed Python package, data sets as `hub:ORG/NAME`, or `stdlib:`, the sources of Python's own
    library."""
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """Most tokens in a sequence (T); at most the context of the models."""
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents that is held out for evaluation, chosen by a hash of their content."""
    separator: str | None = None
    """Text that is put after each plain document; the tokenizer's end of text if unset, "" for
    nothing."""
    pack: bool = True
    """Whether short documents share a sequence; they do not see one another."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens with an unusable row, such as a chat that the template cannot render: `refuse`
    ends the command at the first one; `skip` leaves all of them out and counts them by reason."""
    as_chat: bool = False
    """Whether prompts and completions become a user message and an assistant message of the
    tokenizer's chat template; otherwise the completion directly follows the prompt."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns in the records; needed only if they differ from the usual names."""
