"""How much each part of a model matters, from its activations on a sample, in one pass.

The formulas are those of Minitron (Muralidharan et al., arXiv 2407.14679), in fp32. Of whatever
runs over the axis in question, first the mean of |x| over the real tokens of a sequence is taken,
then the L2 norm over the sequences; the order matters. So

    s = sqrt(sum over sequences (mean over tokens |x|)^2)

    neuron   x is the input of the feed-forward layer's second matrix, behind the activation
    channel  x is what a norm that reads the residual stream puts out; the sum of s over all norms
    head     x is the input of the matrix behind attention; the L2 norm of s over a head's numbers
    layer    1 - cos(what goes in, what comes out), mean over tokens (block influence, Men et al.,
             arXiv 2403.03853), or by how much the loss rises when it is left out

Neurons and heads are ranked within their layer, channels over the whole model.

By the loss, layers go one after another, each time the one without which the loss is lowest while
those before it are gone. Held-out loss of a Llama of 5 layers trained on TinyStories (1.648 whole),
the best of all choices of so many layers, and what was chosen on 96 other stories:

    layers kept                         4      3      2      1
    best                            2.391  3.411  4.947  8.430
    by loss, one after another      2.391  3.411  4.947  8.430
    by loss, all at once            2.391  4.359  7.144  13.98
    by influence, all at once       2.391  4.359  6.492  13.98
    by influence, one after another 2.391  4.330  8.374  8.430

So influence, which is no better for it, stays with its one pass.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ...evaluation.heldout_loss import label_logprobs
from ...report import Report, Reporter, silent
from .layers import hand_through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...models.output_head import OutputHead
    from .anatomy import Anatomy
    from .sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Scores: what has less is cut first. On the CPU, in fp32."""

    channels_D: torch.Tensor
    neurons_LF: torch.Tensor
    heads_LH: torch.Tensor
    layers_L: torch.Tensor
    loss: float
    """Mean -log p(label) of the model over the sample, in nats."""
    gone: tuple[int, ...] = ()
    """Layers in the order in which they go, where scores alone do not tell."""


@torch.no_grad()
def measure(
    head: OutputHead,
    anatomy: Anatomy,
    sample: Sample,
    stage: str,
    report: Reporter = silent,
) -> Importance:
    """Run the model over the sample once and score its parts."""
    watch = _Watch(head.model, anatomy)
    with watch.watching():
        loss = sample_loss(head, sample, stage, report, watch.look_at)
    return watch.importance(loss)


@torch.no_grad()
def judge_layers_by_loss(
    importance: Importance,
    head: OutputHead,
    anatomy: Anatomy,
    sample: Sample,
    keep: int,
    stage: str,
    report: Reporter = silent,
) -> Importance:
    """Leave out layers one after another until `keep` are left, each time the one without which the
    loss over the sample is lowest; of equal ones the last.

    Takes a pass over the sample for each layer that is still there, for each that goes. A layer's
    score is how far the loss is above the whole model's when it goes, or would have gone last.
    """
    layers = head.model.get_submodule(anatomy.family.layers)
    rises_L = torch.zeros(len(layers))
    gone: list[int] = []
    passes = sum(range(keep + 1, len(layers) + 1))
    done = 0
    with contextlib.ExitStack() as idle:
        while len(layers) - len(gone) > keep:
            left = [number for number in range(len(layers)) if number not in gone]
            for number in left:
                without = ", ".join(map(str, [*gone, number]))
                part = f"pass {done + 1} of {passes}, without layer{'s' * bool(gone)} {without}"
                told = _one_of_several(report, part, done * len(sample), passes * len(sample))
                with _left_out(layers[number]):
                    loss = sample_loss(head, sample, f"{stage} choice of layers", told)
                done += 1
                rises_L[number] = loss - importance.loss
            gone.append(min(reversed(left), key=lambda number: float(rises_L[number])))
            idle.enter_context(_left_out(layers[gone[-1]]))
    return replace(importance, layers_L=rises_L, gone=tuple(gone))


def _one_of_several(report: Reporter, part: str, before: int, total: int) -> Reporter:
    """A reporter for one pass of a stage that makes several, counted over all of them."""

    def told(own: Report) -> None:
        report(replace(own, part=part, done=before + own.done, total=total))

    return told


@contextlib.contextmanager
def _left_out(layer: torch.nn.Module) -> Iterator[None]:
    hook = layer.register_forward_hook(hand_through, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def sample_loss(
    head: OutputHead,
    sample: Sample,
    stage: str,
    report: Reporter = silent,
    look_at: Callable[[torch.Tensor], None] = lambda lengths: None,
) -> float:
    """Mean -log p(label) over the sample's supervised positions, in nats.

    stage    names the pass, in reports
    look_at  called before each forward pass with [B] how many real tokens its sequences have
    """
    total, positions, done = 0.0, 0, 0
    report(Report(stage=stage, total=len(sample), unit="sequences"))
    for block in sample.batches():
        look_at(torch.from_numpy(block.tokens.lengths))
        total -= label_logprobs(head, block, sample.isolation)
        positions += len(block.positions.values)
        done += len(block)
        report(Report(stage=stage, done=done, total=len(sample), step=len(block), unit="sequences"))
    return total / max(1, positions)


@dataclass(slots=True)
class _Watch:
    """Hooks on a model, and the sums that they gather."""

    model: Any
    anatomy: Anatomy
    mask_BT: torch.Tensor | None = None
    """1 where a token is real, 0 where a row is padded."""
    tokens: int = 0
    sums: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    """By what is watched and of which module."""

    def look_at(self, lengths_B: torch.Tensor) -> None:
        """What comes next."""
        longest = int(lengths_B.max())
        self.mask_BT = (torch.arange(longest) < lengths_B[:, None]).float()
        self.tokens += int(lengths_B.sum())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Gather while the block runs."""
        family, hooks = self.anatomy.family, []
        for prefix, layer in self._layers():
            for name in (family.feed_forward_out, family.attention_out):
                module, key = layer.get_submodule(name), ("activity", f"{prefix}.{name}")
                hooks.append(module.register_forward_pre_hook(self._on_input(key)))
            hooks += [
                layer.get_submodule(name).register_forward_hook(
                    self._on_output(("activity", f"{prefix}.{name}"))
                )
                for name in family.readers
            ]
            hooks.append(layer.register_forward_hook(self._on_layer(prefix), with_kwargs=True))
        hooks.append(
            self.model.get_submodule(family.last_norm).register_forward_hook(
                self._on_output(("activity", family.last_norm))
            )
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layers(self) -> list[tuple[str, Any]]:
        path = self.anatomy.family.layers
        return [(f"{path}.{i}", layer) for i, layer in enumerate(self.model.get_submodule(path))]

    def _mask(self, states: torch.Tensor) -> torch.Tensor:
        assert self.mask_BT is not None
        return self.mask_BT.to(states.device)

    def _add(self, key: tuple[str, str], value: torch.Tensor) -> None:
        known = self.sums.get(key)
        self.sums[key] = value if known is None else known + value

    def _activity(self, key: tuple[str, str], states_BTD: torch.Tensor) -> None:
        mask_BT = self._mask(states_BTD)
        sums_BD = torch.einsum("btd,bt->bd", states_BTD.float().abs(), mask_BT)
        means_BD = sums_BD / mask_BT.sum(1, keepdim=True)
        self._add(key, means_BD.square().sum(0))

    def _on_input(self, key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self._activity(key, inputs[0])

        return hook

    def _on_output(self, key: tuple[str, str]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self._activity(key, output)

        return hook

    def _on_layer(self, prefix: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
            before_BTD = inputs[0] if inputs else named["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output
            cosine_BT = torch.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            turned = ((1 - cosine_BT) * self._mask(cosine_BT)).double().sum()
            self._add(("influence", prefix), turned)

        return hook

    def importance(self, loss: float) -> Importance:
        """What was gathered, as scores."""
        family, sizes = self.anatomy.family, self.anatomy.sizes
        prefixes = [prefix for prefix, _ in self._layers()]

        def scores(name: str) -> torch.Tensor:
            return self.sums["activity", name].sqrt().cpu()

        readers = [f"{prefix}.{name}" for prefix in prefixes for name in family.readers]
        outputs_LX = torch.stack([scores(f"{p}.{family.attention_out}") for p in prefixes])
        by_head_LHX = outputs_LX.view(sizes.layers, sizes.heads, self.anatomy.head_width)
        return Importance(
            channels_D=torch.stack([scores(name) for name in [*readers, family.last_norm]]).sum(0),
            neurons_LF=torch.stack([scores(f"{p}.{family.feed_forward_out}") for p in prefixes]),
            heads_LH=by_head_LHX.norm(dim=2),
            layers_L=torch.stack(
                [self.sums["influence", prefix].cpu() / self.tokens for prefix in prefixes]
            ).float(),
            loss=loss,
        )
