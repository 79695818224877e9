"""Settings of a student's objective: the weights of its losses, and their schedules.

The string below a field is its meaning in the recipe reference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from .config import ConfigTable, InRecipe, Share, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightConfig(ConfigTable):
    """A loss weight that changes during training."""

    weight: Weight
    """Target value: `linear` reaches it in the last step, `wsd` after its warm-up."""
    schedule: Literal["constant", "linear", "wsd"] = "constant"
    """`linear` goes from `start` to `weight` over all steps; `wsd` warms up, stays and decays."""
    start: Weight = 0.0
    """Value in the first step."""
    end: Weight = 0.0
    """Value in the last step of `wsd`."""
    warmup: Share = 0.1
    """Share of the steps in which `wsd` goes from `start` to `weight`."""
    decay: Share = 0.01
    """Share of the steps in which `wsd` goes from `weight` to `end`."""

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
        """Upper bound of the weight, reached if there are enough steps."""
        of_wsd = self.schedule == "wsd"
        begun = self.start if self.schedule == "linear" or (of_wsd and self.warmup) else 0.0
        return max(self.weight, begun, self.end if of_wsd and self.decay else 0.0)


def _weight_table(value: Any) -> Any:
    """Return the table that a plain weight stands for."""
    return value if isinstance(value, dict | WeightConfig) else {"weight": value}


def _plain_weight(value: WeightConfig) -> float | WeightConfig:
    """Turn a constant weight's table back into a number, so that it is a number everywhere."""
    return value.weight if value.schedule == "constant" else value


def _as_in_a_recipe(value: float | WeightConfig) -> Any:
    return asdict(value) if isinstance(value, WeightConfig) else value


if TYPE_CHECKING:
    ScheduledWeight = float | WeightConfig
else:  # a plain number goes through the table too, so that a bad weight has one message
    ScheduledWeight = Annotated[
        WeightConfig,
        BeforeValidator(_weight_table),
        AfterValidator(_plain_weight),
        PlainSerializer(_as_in_a_recipe),
        InRecipe("number at least 0, or table"),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(ConfigTable):
    """A student's objective: a weighted sum of losses. Each weight is a number, or a table such as
    { weight = 0.9, schedule = "wsd" }."""

    kl: ScheduledWeight = 1.0
    """Weight of the forward KL divergence, KL(teacher || student)."""
    cross_entropy: ScheduledWeight = 0.0
    """Weight of the cross-entropy with the actual next token."""
    reverse_kl: ScheduledWeight = 0.0
    """Weight of the reverse KL divergence, KL(student || teacher); needs a store with a head."""
    jsd: ScheduledWeight = 0.0
    """Weight of the generalised Jensen-Shannon divergence; needs a store with a head."""
    total_variation: ScheduledWeight = 0.0
    """Weight of the total variation distance; needs a store with a head."""
    skew_kl: ScheduledWeight = 0.0
    """Weight of the forward KL divergence to a mixture of student and teacher; needs a store with a
    head or with temperatures."""
    skew_reverse_kl: ScheduledWeight = 0.0
    """Weight of the reverse KL divergence to a mixture of teacher and student; needs a store with a
    head."""
    residual_to_label: ScheduledWeight = 0.0
    """Weight of the forward KL divergence from the head, with the probability outside the head put
    on the actual next token; needs a store with a head."""
    chunk_likelihood: ScheduledWeight = 0.0
    """Weight of the divergence between the probabilities of chunks of text, for students with other
    tokens than the teacher (ALM, arXiv 2503.20083). With the same tokens a chunk is a token."""
    branches: ScheduledWeight = 0.0
    """Weight of the cross-entropy with words beside the text: words that the teacher might say, and
    that a student with other tokens spells with several tokens. A weight that falls to 0, such as
    { schedule = "linear", start = 2, weight = 0 }, works best."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Temperature of teacher and student in every loss except cross-entropy. Temperatures other
    than 1 must be listed in `logits.temperatures`."""
    beta: Share | None = None
    """Share of the teacher in the mixture of `jsd`; 1/2 if unset. 0 is the forward KL divergence, 1
    the reverse one."""
    skew: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share that is mixed in for `skew_kl` and `skew_reverse_kl`; 0.1 if unset."""
    labels_inside: bool = False
    """Whether `cross_entropy` counts only inside chunks of text, where losses other than `kl` teach
    nothing to a student with other tokens than the teacher, and not at all positions."""
    tau: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """How much `chunk_likelihood` damps the logarithms of probabilities; 100 if unset."""

    @property
    def parameters(self) -> dict[str, float]:
        """Parameters of the losses that are set, by name."""
        inside = 1.0 if self.labels_inside else None
        given = {"beta": self.beta, "skew": self.skew, "tau": self.tau, "inside": inside}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def weights(self) -> dict[str, WeightConfig]:
        """Weights by loss name, without losses whose weight is always 0."""
        others = {"temperature", "beta", "skew", "tau", "labels_inside"}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        tables = {
            name: weight if isinstance(weight, WeightConfig) else WeightConfig(weight=weight)
            for name, weight in given.items()
        }
        return {name: weight for name, weight in tables.items() if weight.largest > 0}
