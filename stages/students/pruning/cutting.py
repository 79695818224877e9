"""One cut of a model: target sizes, importance, surgery, and the loss before and after."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ...models.device import best_device
from ...models.isolation import student_isolation
from ...models.output_head import connect_head
from ...report import Report, Reporter, silent
from .anatomy import anatomy_of
from .importance import calibration_set, judge_layers_by_loss, measure, sample_loss
from .shapes import all_target_sizes, shortfall
from .surgery import choose, cut

if TYPE_CHECKING:
    from ....data.store.reader import StoreReader
    from .config import PruneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """A cut to be made."""

    model: Any
    """The model to cut, on the CPU. It must not be used afterwards."""
    cuts: tuple[PruneConfig, ...]
    """The cut to make, and the later ones, which must be possible too."""
    teacher: int | None
    """Parameters of the teacher, of which budgets are shares; None if `model` is the teacher."""
    store: StoreReader
    seed: int
    """Seed of the calibration set."""
    stage: str
    """Name in reports."""
    where: str
    """The recipe's table, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A pruned model and its record."""

    model: Any
    """The model on the CPU, in fp32."""
    record: dict[str, Any]
    """Sizes, parameters and loss before and after, and the kept parts, as a JSON value."""


def make_cut(job: Cutting, report: Reporter = silent) -> Pruned:
    """Cut a model by the importance of its parts on sequences of the store.

    Raises
        ColdstillError: a family without a layout, sizes that are impossible, a model that cannot
            keep the store's documents apart, or a loss that is NaN or infinite
    """
    model, config = job.model, job.cuts[0]
    vocabulary = job.store.manifest.tokenizer.size
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = getattr(model.config, "num_attention_heads", None)
    anatomy = anatomy_of(model.config.model_type, heads, shapes, job.where)
    teacher = job.teacher or anatomy.parameters(anatomy.sizes)
    sizes = all_target_sizes(anatomy, job.cuts, teacher, job.where)[0]
    model.to(best_device())
    isolation = student_isolation(model, job.store, job.where)
    sample = calibration_set(job.store, config.sequences, job.seed, isolation)
    head = connect_head(model, vocabulary, report)
    stage = f"{job.stage} importance and loss before"
    importance = measure(head, anatomy, sample, stage, report)
    _expect_finite(importance.loss, "before", job.where)
    if config.layers_by == "loss" and sizes.layers < anatomy.sizes.layers:
        importance = judge_layers_by_loss(
            importance, head, anatomy, sample, sizes.layers, job.stage, report
        )
    report(Report(stage=job.stage, doing="cut the weights"))
    kept = choose(anatomy, sizes, importance)
    smaller = cut(model.cpu(), anatomy, kept, job.where)
    after = connect_head(smaller.to(best_device()), vocabulary)
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
        # neurons and channels are left out: thousands of numbers
        "kept": {
            "layers": kept.layers,
            "heads": [heads_H.tolist() for heads_H in kept.heads],
            "kv_heads": [heads_G.tolist() for heads_G in kept.kv_heads],
        },
        "layer_scores": [round(score, 6) for score in importance.layers_L.tolist()],
    }
    return Pruned(model=smaller.cpu(), record=record)


def _expect_finite(loss: float, when: str, where: str) -> None:
    if not math.isfinite(loss):
        raise ColdstillError(
            f"{where}: the loss on the store's sequences is {loss} {when} the cut, expected a "
            "finite number; the model's weights overflow in their precision"
        )
