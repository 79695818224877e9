"""One cut of a model: target sizes, importance, surgery, and the loss before and after.

Surgery makes a smaller model of the same class from the most important parts of a larger one.
Removing channels changes norms. A norm divides by the root of the mean square over all channels, so
its output has the length sqrt(D). With D' channels left the length is sqrt(D'), and everything
computed from it becomes smaller. Therefore the norm's weight is multiplied by sqrt(D / D'), which
keeps the length, and the epsilon under the root by D / D'. The result is exact if the removed
channels are dead (always 0; for a LayerNorm always the mean), and better in general: the held-out
loss of a small trained Llama (4.995) with 224, 192 and 128 of its 256 channels was 5.012, 5.084 and
5.445. It was 5.027, 5.193 and 6.078 with unchanged weights, and 5.014, 5.121 and 5.764 with weights
that keep the scale of every single channel, from the share of the square that was removed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....data.errors import ColdstillError, first_line
from ...models.device import best_device
from ...models.isolation import student_isolation
from ...models.loading import load_state
from ...models.output_head import connect_head
from ...report import Report, Reporter, silent
from .anatomy import Sizes, anatomy_of
from .importance import (
    Importance,
    calibration_set,
    judge_layers_by_loss,
    measure_importance,
    sample_loss,
)
from .layers import cut_to_layers
from .shapes import all_target_sizes, shortfall

if TYPE_CHECKING:
    from pathlib import Path

    from ....data.store.reader import StoreReader
    from .anatomy import Anatomy, Axis
    from .config import PruneConfig

_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """Indices of the kept parts of a model; all increasing."""

    layers: list[int]
    hidden: torch.Tensor
    """[D'] channels of the residual stream."""
    neurons: list[torch.Tensor]
    """[F'] neurons of each kept layer."""
    heads: list[torch.Tensor]
    """[H'] query heads of each kept layer."""
    kv_heads: list[torch.Tensor]
    """[G'] key-value heads of each kept layer."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            layers=len(self.layers),
            hidden=len(self.hidden),
            feed_forward=len(self.neurons[0]),
            heads=len(self.heads[0]),
            kv_heads=len(self.kv_heads[0]),
        )


def kept_parts(anatomy: Anatomy, sizes: Sizes, importance: Importance) -> Kept:
    """Keep the parts with the highest scores; of equal ones the first."""
    whole = anatomy.sizes
    removed = importance.removed[: whole.layers - sizes.layers]
    layers = [layer for layer in range(whole.layers) if layer not in removed]
    if not removed:
        layers = _best(importance.layers_L, sizes.layers).tolist()
    group = whole.heads // whole.kv_heads
    kept_groups, kept_heads, in_group = [], [], sizes.heads // sizes.kv_heads
    for layer in layers:
        scores_GQ = importance.heads_LH[layer].view(whole.kv_heads, group)
        groups = _best(scores_GQ.norm(dim=1), sizes.kv_heads)
        kept_groups.append(groups)
        heads = [g * group + _best(scores_GQ[g], in_group) for g in groups.tolist()]
        kept_heads.append(torch.cat(heads))
    return Kept(
        layers=layers,
        hidden=_best(importance.channels_D, sizes.hidden),
        neurons=[_best(importance.neurons_LF[layer], sizes.feed_forward) for layer in layers],
        heads=kept_heads,
        kv_heads=kept_groups,
    )


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def cut(model: Any, anatomy: Anatomy, kept: Kept, where: str) -> Any:
    """A new model in fp32 from the kept parts. Tensors that are not cut are shared with the model,
    which must not be used afterwards.

    Raises
        ColdstillError: layers depend on their position, or the smaller model cannot be made
    """
    if len(kept.layers) < anatomy.sizes.layers:
        model = cut_to_layers(model, kept.layers, where)
    state = {
        name: _cut_tensor(anatomy, kept, name, tensor.float())
        for name, tensor in model.state_dict().items()
    }
    config = _smaller(model.config, anatomy, kept)
    _rescale(state, anatomy, kept, tied=bool(config.tie_word_embeddings))
    try:
        student = load_state(type(model), config, state, dtype=torch.float32)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _cannot(where, anatomy, first_line(error)) from error
    student.config._name_or_path = model.config._name_or_path  # transformers sets "None"
    student.generation_config = copy.deepcopy(model.generation_config)
    loaded = student.state_dict()
    if loaded.keys() != state.keys():
        raise _cannot(where, anatomy, "the smaller model has other tensors")
    for name, tensor in state.items():
        if not torch.equal(loaded[name], tensor):
            raise _cannot(where, anatomy, f"{name} changed when it was loaded")
    return student


def _cannot(where: str, anatomy: Anatomy, reason: str) -> ColdstillError:
    return ColdstillError(f"{where}: cannot make a smaller {anatomy.name!r} model: {reason}")


def _smaller(config: Any, anatomy: Anatomy, kept: Kept) -> Any:
    smaller = copy.deepcopy(config)
    for key, value in anatomy.settings(kept.sizes).items():
        setattr(smaller, key, value)
    for key in _EPSILONS:
        if hasattr(smaller, key):
            setattr(smaller, key, getattr(smaller, key) * anatomy.sizes.hidden / len(kept.hidden))
    return smaller


def _rescale(state: dict[str, torch.Tensor], anatomy: Anatomy, kept: Kept, *, tied: bool) -> None:
    """Correct the scale for removed channels: in norms, and in embeddings that the model multiplies
    by the square root of their width. For an output head tied to such embeddings, the last norm
    keeps its weight."""
    layout = anatomy.layout
    factor = math.sqrt(anatomy.sizes.hidden / len(kept.hidden))
    if factor == 1.0:
        return
    factors = {
        f"{layout.layers}.{layer}.{norm}": factor
        for layer in range(len(kept.layers))
        for norm in (*layout.readers, *layout.writers)
    }
    factors[layout.last_norm] = factor
    if layout.scaled_embedding:
        state[f"{layout.embedding}.weight"] = state[f"{layout.embedding}.weight"] * factor
        if tied:
            state["lm_head.weight"] = state[f"{layout.embedding}.weight"]
            factors[layout.last_norm] = 1.0
    for name, by in factors.items():
        weight, offset = state[f"{name}.weight"], layout.norm_offset
        state[f"{name}.weight"] = (weight + offset) * by - offset


def _cut_tensor(anatomy: Anatomy, kept: Kept, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The kept part of a tensor, by its name in a model that has only the kept layers."""
    axes = anatomy.axes(name)
    if axes is None:
        return tensor
    inside = name.removeprefix(f"{anatomy.layout.layers}.")
    layer = int(inside.partition(".")[0]) if inside != name else 0
    for dimension, axis in enumerate(axes):
        if axis != "free":
            indices = _indices(anatomy, kept, axis, layer).to(tensor.device)
            if len(indices) < tensor.shape[dimension]:
                tensor = tensor.index_select(dimension, indices)
    return tensor


def _indices(anatomy: Anatomy, kept: Kept, axis: Axis, layer: int) -> torch.Tensor:
    width = anatomy.head_width
    if axis == "hidden":
        return kept.hidden
    if axis == "feed_forward":
        return kept.neurons[layer]
    if axis == "key":
        return _spread(kept.kv_heads[layer], width)
    if axis == "three_by_head":
        return _spread(kept.heads[layer], 3 * width)
    queries = _spread(kept.heads[layer], width)
    if axis == "query":
        return queries
    whole = anatomy.sizes.heads * width  # all queries, then all keys, then all values
    return torch.cat([queries, queries + whole, queries + 2 * whole])


def _spread(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of all numbers of these heads."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def make_cut(
    model: Any,
    cuts: tuple[PruneConfig, ...],
    store: StoreReader,
    *,
    teacher: int | None = None,
    seed: int,
    stage: str,
    where: str,
    scores: Path | None = None,
    report: Reporter = silent,
) -> tuple[Any, dict[str, Any]]:
    """Cut a model by the importance of its parts on sequences of the store.

    model    the model to cut, on the CPU; it must not be used afterwards
    cuts     the cut to make, and the later ones, which must be possible too
    teacher  parameters of the teacher, of which budgets are shares; None if `model` is the teacher
    seed     seed of the calibration set
    where    the recipe's table, for messages
    scores   file of the importance on this sample, which other cuts of the model share: it is read
             if it exists, and written otherwise; None always measures

    Returns the pruned model on the CPU in fp32, and its record as a JSON value: sizes, parameters
    and loss before and after, and the kept parts.

    Raises
        ColdstillError: a family without a layout, sizes that are impossible, a model that cannot
            keep the store's documents apart, or a loss that is NaN or infinite
    """
    config, vocabulary = cuts[0], store.manifest.tokenizer.size
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = getattr(model.config, "num_attention_heads", None)
    anatomy = anatomy_of(model.config.model_type, heads, shapes, where)
    whole = anatomy.parameters(anatomy.sizes)
    is_teacher, teacher = teacher is None, teacher or whole
    sizes = all_target_sizes(anatomy, cuts, teacher, where)[0]
    model.to(best_device())
    isolation = student_isolation(model, store, where)
    sample = calibration_set(store, config.sequences, seed, isolation)
    head = connect_head(model, vocabulary, report)
    importance = None if scores is None else Importance.read(scores)
    known = importance is not None
    if scores is not None and not known and scores.exists():
        again = f"importance is measured again: {scores} is damaged"
        report(Report(stage=stage, note=again, warning=True))
    if importance is None:
        importance = measure_importance(
            head, anatomy, sample, f"{stage} importance", report,
            loss=sample.teacher_loss() if is_teacher else None,
        )  # fmt: skip
    else:
        shared = f"importance is known from another cut of this model: {scores}"
        report(Report(stage=stage, note=shared))
    if not importance.finite:
        raise ColdstillError(
            f"{where}: the model's activations on the store's sequences are NaN or infinite; its "
            "weights are damaged, or overflow in their precision"
        )
    _expect_finite(importance.loss, "before", where)
    if scores is not None and not known:
        importance.write(scores)
    if config.layers_by == "loss" and sizes.layers < anatomy.sizes.layers:
        importance = judge_layers_by_loss(
            importance, head, anatomy, sample, sizes.layers, stage, report
        )
    report(Report(stage=stage, doing="cut the weights"))
    kept = kept_parts(anatomy, sizes, importance)
    smaller = cut(model.cpu(), anatomy, kept, where)
    after = connect_head(smaller.to(best_device()), vocabulary)
    left = smaller.num_parameters()
    if (note := shortfall(config, left, teacher, where)) is not None:
        report(Report(stage=stage, note=note, warning=True))
    loss = sample_loss(after, sample, f"{stage} loss after", report)
    _expect_finite(loss, "after", where)
    record = {
        "parameters": {"teacher": teacher, "before": whole, "after": left},
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
    return smaller.cpu(), record


def _expect_finite(loss: float, when: str, where: str) -> None:
    if not math.isfinite(loss):
        raise ColdstillError(
            f"{where}: the loss on the store's sequences is {loss} {when} the cut, expected a "
            "finite number; the model's weights overflow in their precision"
        )
