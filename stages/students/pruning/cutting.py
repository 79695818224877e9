"""A cut from beginning to end: sizes, importance, surgery, and what became of the loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ...models.device import best_device
from ...models.isolation_choice import student_isolation
from ...models.output_head import connect_head
from ...report import Report, Reporter, silent
from .anatomy import anatomy_of
from .importance import judge_layers_by_loss, measure, sample_loss
from .sample import sample_of
from .shapes import all_target_sizes, shortfall
from .surgery import choose, cut

if TYPE_CHECKING:
    import torch

    from ....data.store.reader import StoreReader
    from ...models.output_head import OutputHead
    from .anatomy import Anatomy, Sizes
    from .config import PruneConfig
    from .importance import Importance
    from .sample import Sample
    from .surgery import Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """What is cut, by what, and what it is measured on."""

    model: Any
    """On the CPU. It is used up."""
    cuts: tuple[PruneConfig, ...]
    """The first is made; the others come after it and must be possible too."""
    teacher: int | None
    """Parameters of the model that shares are of; the model's own unless given."""
    store: StoreReader
    seed: int
    """Of the sample."""
    stage: str
    """For reports."""
    where: str
    """The recipe's table, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What is left, and what is to be told of it."""

    model: Any
    """On the CPU, in fp32."""
    record: dict[str, Any]
    """A JSON value: sizes, parameters and loss before and after, what was kept."""


def make_cut(job: Cutting, report: Reporter = silent) -> Pruned:
    """Cut a model by what it does on a sample of the store.

    Raises
        ColdstillError: a family without a table, sizes that cannot be, a model that cannot keep the
            store's documents apart or whose loss is no number
    """
    model, config = job.model, job.cuts[0]
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = getattr(model.config, "num_attention_heads", None)
    anatomy = anatomy_of(model.config.model_type, heads, shapes, job.where)
    teacher = job.teacher or anatomy.parameters(anatomy.sizes)
    sizes = all_target_sizes(anatomy, job.cuts, teacher, job.where)[0]
    model.to(best_device())
    sample = sample_of(
        job.store, config.sequences, job.seed, student_isolation(model, job.store, job.where)
    )
    head = connect_head(model, job.store.manifest.tokenizer.size, report)
    importance = _importance(job, head, anatomy, sizes, sample, report)
    report(Report(stage=job.stage, doing="cut the weights"))
    kept = choose(anatomy, sizes, importance)
    smaller = cut(model.cpu(), anatomy, kept, job.where)
    after = connect_head(smaller.to(best_device()), job.store.manifest.tokenizer.size)
    left = smaller.num_parameters()
    if (note := shortfall(config, left, teacher, job.where)) is not None:
        report(Report(stage=job.stage, note=note, warning=True))
    loss = sample_loss(after, sample, f"{job.stage} loss after", report)
    _expect_finite(loss, "after", job.where)
    record = {
        "parameters": {
            "teacher": teacher,
            "before": anatomy.parameters(anatomy.sizes),
            "after": left,
        },
        "sizes": {"before": asdict(anatomy.sizes), "after": asdict(sizes)},
        "loss": {"before": importance.loss, "after": loss, "sequences": len(sample)},
        "kept": _kept(kept),
        "layer_scores": _rounded(importance.layers_L),
    }
    return Pruned(model=smaller.cpu(), record=record)


def _importance(
    job: Cutting,
    head: OutputHead,
    anatomy: Anatomy,
    sizes: Sizes,
    sample: Sample,
    report: Reporter,
) -> Importance:
    stage = f"{job.stage} importance and loss before"
    importance = measure(head, anatomy, sample, stage, report)
    _expect_finite(importance.loss, "before", job.where)
    if job.cuts[0].layers_by == "influence" or sizes.layers == anatomy.sizes.layers:
        return importance
    return judge_layers_by_loss(importance, head, anatomy, sample, sizes.layers, job.stage, report)


def _expect_finite(loss: float, when: str, where: str) -> None:
    if not math.isfinite(loss):
        raise ColdstillError(
            f"{where}: the loss on the store's sequences is {loss} {when} the cut, expected a "
            "finite number; the model's weights do not hold in their precision"
        )


def _kept(kept: Kept) -> dict[str, Any]:
    """Neurons and channels are thousands of numbers that nobody reads; heads and layers are few."""
    return {
        "layers": kept.layers,
        "heads": [heads.tolist() for heads in kept.heads],
        "kv_heads": [heads.tolist() for heads in kept.kv_heads],
    }


def _rounded(scores: torch.Tensor) -> list[float]:
    return [round(score, 6) for score in scores.tolist()]
