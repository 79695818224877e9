"""Makes a smaller model of the same class from the most important parts of a larger one.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....data.errors import ColdstillError, first_line
from ...models.loading import load_state
from .anatomy import Sizes
from .layers import cut_to_layers

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .families import Axis
    from .importance import Importance

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
        """Sizes of the kept parts."""
        return Sizes(
            layers=len(self.layers),
            hidden=len(self.hidden),
            feed_forward=len(self.neurons[0]),
            heads=len(self.heads[0]),
            kv_heads=len(self.kv_heads[0]),
        )


def choose(anatomy: Anatomy, sizes: Sizes, importance: Importance) -> Kept:
    """Keep the parts with the highest scores; of equal ones the first."""
    whole = anatomy.sizes
    removed = importance.removed[: whole.layers - sizes.layers]
    layers = [layer for layer in range(whole.layers) if layer not in removed]
    if not removed:
        layers = _best(importance.layers_L, sizes.layers).tolist()
    group = whole.heads // whole.kv_heads
    kept_groups, kept_heads = [], []
    for layer in layers:
        scores_GQ = importance.heads_LH[layer].view(whole.kv_heads, group)
        groups = _best(scores_GQ.norm(dim=1), sizes.kv_heads)
        kept_groups.append(groups)
        kept_heads.append(
            torch.cat(
                [
                    g * group + _best(scores_GQ[g], sizes.heads // sizes.kv_heads)
                    for g in groups.tolist()
                ]
            )
        )
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
    knife = _Knife(anatomy, kept)
    state = {name: knife.cut(name, tensor.float()) for name, tensor in model.state_dict().items()}
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


class _Knife:
    """Cuts tensors by their names in a model that has only the kept layers."""

    def __init__(self, anatomy: Anatomy, kept: Kept) -> None:
        self.anatomy, self.kept = anatomy, kept

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The kept part of a tensor."""
        axes = self.anatomy.axes(name)
        if axes is None:
            return tensor
        inside = name.removeprefix(f"{self.anatomy.layout.layers}.")
        layer = int(inside.partition(".")[0]) if inside != name else 0
        for dimension, axis in enumerate(axes):
            if axis != "free":
                indices = self._indices(axis, layer).to(tensor.device)
                if len(indices) < tensor.shape[dimension]:
                    tensor = tensor.index_select(dimension, indices)
        return tensor

    def _indices(self, axis: Axis, layer: int) -> torch.Tensor:
        kept, width = self.kept, self.anatomy.head_width
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
        whole = self.anatomy.sizes.heads * width  # all queries, then all keys, then all values
        return torch.cat([queries, queries + whole, queries + 2 * whole])


def _spread(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of all numbers of these heads."""
    return (heads[:, None] * width + torch.arange(width)).flatten()
