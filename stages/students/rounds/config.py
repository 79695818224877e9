"""Settings of rounds. Nothing heavy is imported here, as in `stages/config.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ...config import (
    GenerateConfig,
    Share,
    Size,
    Weight,
)
from ...objective_config import ObjectiveConfig

if TYPE_CHECKING:
    from ....data.prepared import Split
    from ...config import TrainConfig

OF_LABELS = ("cross_entropy", "residual_to_label")
"""Losses that learn the token that comes next in the text. In a student's own text that token is
the student's choice, not the teacher's."""

BATCH_TOKENS = 16_384
"""Most tokens of a batch of prompts with their answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """How a student learns from text that it writes itself. After each training but the last it
    answers prompts of the corpus, the teacher scores the answers, and the next training continues
    from its weights on a mixture of both texts. The prompts are those of chats and of prompts with
    completions, and the beginnings of plain documents."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    count: Annotated[int, Field(ge=2)]
    """Number of trainings. With 2 the student is trained, writes, and is trained once more."""
    prompts: Size = 1024
    """Prompts of training documents that the student answers after each training but the last;
    fewer if the store has fewer documents."""
    heldout: Size = 64
    """Prompts of held-out documents that it answers after every training. `evaluate` measures its
    KL and acceptance on these answers."""
    share: Share = 0.5
    """Share of the sequences of a later training that are the student's own text; 0 trains on the
    old text only, for comparison."""
    prompt_tokens: Size = 32
    """Tokens of a plain document that serve as its prompt; at most half of the document."""
    max_new_tokens: Size = 256
    """Most tokens of an answer. It ends earlier at an end token or when the sequence is full."""
    temperature: Weight = 1.0
    """Temperature at which the student samples; 0 always takes the most probable token."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The student samples only from the smallest set of tokens that has this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """The student samples only from this many most probable tokens; 0 means all."""
    steps: Size | None = None
    """Steps of each later training; `train.steps` if unset."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Highest learning rate of the later trainings; `train.learning_rate` if unset."""
    objective: ObjectiveConfig | None = None
    """Objective of the later trainings; the student's `objective` if unset. It cannot have
    `cross_entropy` or `residual_to_label`, unless `share` is 0: they would teach the student what
    it wrote."""

    @property
    def sampling(self) -> GenerateConfig:
        """How the student answers."""
        return GenerateConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def written(self, number: int) -> tuple[Split, ...]:
        """The splits of the text that the student writes after a training, counted from 1."""
        both = number < self.count and self.share > 0
        return ("train", "heldout") if both else ("heldout",)

    def training(self, first: TrainConfig) -> TrainConfig:
        """Settings of the later trainings, from those of the first."""
        return replace(
            first,
            steps=self.steps or first.steps,
            learning_rate=self.learning_rate or first.learning_rate,
        )

    def learned_with(self, first: ObjectiveConfig) -> ObjectiveConfig:
        """The objective of the later trainings, from that of the first.

        Raises
            ValueError: it would teach the student its own choices
        """
        objective = self.objective or first
        labels = [name for name in OF_LABELS if name in objective.weights]
        if labels and self.share > 0:
            raise ValueError(
                f"rounds: the objective has {labels[0]!r}, which would teach the student the "
                "tokens that it wrote itself; set rounds.objective without it, such as "
                "{ kl = 1.0 }, or share = 0"
            )
        return objective


def counted_rounds(value: Any) -> Any:
    """Return the table that a plain number of trainings stands for; one training has no rounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return None if value == 1 else {"count": value}
