"""Importance of each part of a model, from its activations on calibration sequences, in one pass.

The formulas are those of Minitron (Muralidharan et al., arXiv 2407.14679), in fp32. For every index
of an axis, first |x| is averaged over the real tokens of a sequence, then the L2 norm is taken over
the sequences; the order matters:

    s = sqrt(sum over sequences (mean over tokens |x|)^2)

    neuron   x is the input of the second feed-forward matrix, after the activation function
    channel  x is the output of a norm that reads the residual stream; the sum of s over all norms
    head     x is the input of the matrix after attention; the L2 norm of s over a head's numbers
    layer    1 - cos(input, output), mean over tokens (block influence, Men et al., arXiv
             2403.03853), or the increase of the loss without the layer

Neurons and heads are ranked within their layer, channels over the whole model.

By the loss, layers are removed one after another: in each round the one without which the loss is
lowest. Held-out loss of a Llama of 5 layers trained on TinyStories (1.648 whole), for the best of
all choices and for the choices made on 96 other stories:

    layers kept                         4      3      2      1
    best                            2.391  3.411  4.947  8.430
    by loss, one after another      2.391  3.411  4.947  8.430
    by loss, all at once            2.391  4.359  7.144  13.98
    by influence, all at once       2.391  4.359  6.492  13.98
    by influence, one after another 2.391  4.330  8.374  8.430

Influence does not improve one after another, so it is measured in a single pass.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ....data.files import whole_file
from ....data.order import joined, regrouped
from ...evaluation.quality import summed_loss
from ...report import Report, Reporter, silent
from .layers import skipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ....data.schema import Block, Sequences
    from ....data.store.reader import StoreReader
    from ...models.inputs import Isolation
    from ...models.output_head import OutputHead
    from .anatomy import Anatomy

_BATCH_TOKENS = 8192
"""Tokens of a forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Sequences of a store on which importance is measured."""

    store: StoreReader
    rows: NDArray[np.int64]
    """Indices of the sequences in the store, increasing."""
    isolation: Isolation
    """How the model keeps documents of a sequence apart."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[Sequences]:
        for block in self._blocks():
            yield block.sequences

    def teacher_loss(self) -> float:
        """Mean -log p(label) in nats as the store has it: that of the teacher, or, in a store of
        somebody's own targets without label log-probabilities, an estimate."""
        labels = np.concatenate([block.targets.label_logprob for block in self._blocks()])
        return -float(labels.astype(np.float64).sum()) / max(1, len(labels))

    def _blocks(self) -> Iterator[Block]:
        count = max(1, _BATCH_TOKENS // self.store.manifest.packing.sequence_length)
        for start in range(0, len(self.rows), count):
            yield self.store.read(self.rows[start : start + count])


def calibration_set(
    store: StoreReader, count: int, seed: int, isolation: Isolation
) -> CalibrationSet:
    """A seeded sample of `count` sequences of a store, or all if there are fewer."""
    # the first sequences of a student's order lie in few shards, so that a remote store need not be
    # downloaded as a whole
    rows = np.sort(joined(itertools.islice(regrouped(store.windows(seed, 0), count), 1)))
    store.will_read([rows])
    return CalibrationSet(store=store, rows=rows, isolation=isolation)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Scores of all parts, on the CPU in fp32. Parts with lower scores are cut first."""

    channels_D: torch.Tensor
    neurons_LF: torch.Tensor
    heads_LH: torch.Tensor
    layers_L: torch.Tensor
    loss: float
    """Mean -log p(label) of the model on the calibration set, in nats."""
    removed: tuple[int, ...] = ()
    """Layers in the order of their removal, if they were removed one after another."""

    def write(self, path: Path) -> None:
        """Write scores, from before any layer was removed, for other cuts of the same model."""
        assert not self.removed
        with whole_file(path) as scratch:
            save_file(dict(self._tensors()), scratch, {"loss": repr(self.loss)})

    @classmethod
    def read(cls, path: Path) -> Importance | None:
        """Scores that were written; None if the file is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(**tensors, loss=float(file.metadata()["loss"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("channels_D", "neurons_LF", "heads_LH", "layers_L"):
            yield name, getattr(self, name).contiguous()

    @property
    def finite(self) -> bool:
        return all(bool(each.isfinite().all()) for _, each in self._tensors())


@torch.no_grad()
def measure_importance(
    head: OutputHead,
    anatomy: Anatomy,
    sample: CalibrationSet,
    stage: str,
    report: Reporter = silent,
    *,
    loss: float | None = None,
) -> Importance:
    """Run the model once over the calibration set and score its parts.

    loss  the model's loss on the calibration set; None measures it in the same pass, which takes
          the output head at every position
    """
    observer = _Observer(head.model, anatomy)
    with observer.observing():
        if loss is None:
            loss = sample_loss(head, sample, stage, report, observer.masked)
        else:
            _run_layers(head, observer.masked(sample.batches()), sample, stage, report)
    return observer.importance(loss)


def _run_layers(
    head: OutputHead,
    batches: Iterator[Sequences],
    sample: CalibrationSet,
    stage: str,
    report: Reporter,
) -> None:
    """Run the model without its output head."""
    done = 0
    report(Report(stage=stage, total=len(sample), unit="sequences"))
    for block in batches:
        head.read(block, sample.isolation)
        done += len(block)
        report(Report(stage=stage, done=done, total=len(sample), step=len(block), unit="sequences"))


@torch.no_grad()
def judge_layers_by_loss(
    importance: Importance,
    head: OutputHead,
    anatomy: Anatomy,
    sample: CalibrationSet,
    keep: int,
    stage: str,
    report: Reporter = silent,
) -> Importance:
    """Remove layers one after another until `keep` are left: in each round the one without which
    the loss is lowest, and of equal ones the last.

    Each round takes a pass over the calibration set for every remaining layer. The score of a layer
    is the increase of the loss over the whole model's when it is removed, or would be next.
    """
    layers = head.model.get_submodule(anatomy.layout.layers)
    increases_L = torch.zeros(len(layers))
    removed: list[int] = []
    passes = sum(range(keep + 1, len(layers) + 1))
    done = 0
    with contextlib.ExitStack() as held:
        while len(layers) - len(removed) > keep:
            left = [number for number in range(len(layers)) if number not in removed]
            for number in left:
                without = ", ".join(map(str, [*removed, number]))
                part = f"pass {done + 1} of {passes}, without layer{'s' * bool(removed)} {without}"
                counted = _part_reporter(report, part, done * len(sample), passes * len(sample))
                with skipped(layers[number]):
                    loss = sample_loss(head, sample, f"{stage} choice of layers", counted)
                done += 1
                increases_L[number] = loss - importance.loss
            removed.append(min(reversed(left), key=lambda number: float(increases_L[number])))
            held.enter_context(skipped(layers[removed[-1]]))
    return replace(importance, layers_L=increases_L, removed=tuple(removed))


def _part_reporter(report: Reporter, part: str, before: int, total: int) -> Reporter:
    """A reporter for one pass of several, which counts over all of them."""

    def counted(own: Report) -> None:
        report(replace(own, part=part, done=before + own.done, total=total))

    return counted


def sample_loss(
    head: OutputHead,
    sample: CalibrationSet,
    stage: str,
    report: Reporter = silent,
    observe: Callable[[Iterator[Sequences]], Iterator[Sequences]] = iter,
) -> float:
    """Mean -log p(label) over the supervised positions of the calibration set, in nats.

    stage    name of the pass in reports
    observe  gets the batches and returns them, each before its forward pass
    """
    batches = observe(sample.batches())
    total, positions = summed_loss(head, batches, sample.isolation, len(sample), stage, report)
    return total / max(1, positions)


@dataclass(slots=True)
class _Observer:
    """Hooks on a model, and the sums that they collect."""

    model: Any
    anatomy: Anatomy
    mask_BT: torch.Tensor = field(init=False)
    """1 for real tokens, 0 for padding."""
    tokens: int = 0
    sums: dict[str, Any] = field(default_factory=dict)
    """Sums of squared means, by module; of influence for a layer."""

    def masked(self, batches: Iterator[Sequences]) -> Iterator[Sequences]:
        """The batches; sets the mask of each."""
        for block in batches:
            lengths_B = torch.from_numpy(block.tokens.lengths)
            self.mask_BT = (torch.arange(int(lengths_B.max())) < lengths_B[:, None]).float()
            self.tokens += int(lengths_B.sum())
            yield block

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        layout, layers, module = self.anatomy.layout, self._layers(), self.model.get_submodule
        hooks = [
            module(layer).register_forward_hook(partial(self._add_layer, layer), with_kwargs=True)
            for layer in layers
        ]
        hooks += [
            module(full).register_forward_pre_hook(partial(self._add_input, full))
            for name in (layout.feed_forward_out, layout.attention_out)
            for full in (f"{layer}.{name}" for layer in layers)
        ]
        hooks += [
            module(full).register_forward_hook(partial(self._add_output, full))
            for full in self._norms()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def importance(self, loss: float) -> Importance:
        layout, sizes, layers = self.anatomy.layout, self.anatomy.sizes, self._layers()

        def scores(names: Iterable[str]) -> torch.Tensor:
            return torch.stack([self.sums[name].sqrt().cpu() for name in names])

        outputs_LX = scores(f"{layer}.{layout.attention_out}" for layer in layers)
        by_head_LHX = outputs_LX.view(sizes.layers, sizes.heads, self.anatomy.head_width)
        influence_L = torch.stack([self.sums[layer].cpu() / self.tokens for layer in layers])
        return Importance(
            channels_D=scores(self._norms()).sum(0),
            neurons_LF=scores(f"{layer}.{layout.feed_forward_out}" for layer in layers),
            heads_LH=by_head_LHX.norm(dim=2),
            layers_L=influence_L.float(),
            loss=loss,
        )

    def _layers(self) -> list[str]:
        path = self.anatomy.layout.layers
        return [f"{path}.{number}" for number in range(self.anatomy.sizes.layers)]

    def _norms(self) -> list[str]:
        """Norms whose outputs are the channels."""
        layout = self.anatomy.layout
        readers = [f"{layer}.{name}" for layer in self._layers() for name in layout.readers]
        return [*readers, layout.last_norm]

    def _add_input(self, name: str, module: Any, inputs: Any) -> None:
        self._add_activity(name, inputs[0])

    def _add_output(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        self._add_activity(name, output)

    def _add_activity(self, name: str, states_BTD: torch.Tensor) -> None:
        """Add the squared mean activity of each sequence."""
        mask_BT = self.mask_BT.to(states_BTD.device)
        sums_BD = torch.einsum("btd,bt->bd", states_BTD.float().abs(), mask_BT)
        means_BD = sums_BD / mask_BT.sum(1, keepdim=True)
        self.sums[name] = self.sums.get(name, 0.0) + means_BD.square().sum(0)

    def _add_layer(
        self, name: str, module: Any, inputs: Any, named: dict[str, Any], output: Any
    ) -> None:
        before_BTD = inputs[0] if inputs else named["hidden_states"]
        after_BTD = output[0] if isinstance(output, tuple) else output
        cosine_BT = torch.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        value = ((1 - cosine_BT) * self.mask_BT.to(cosine_BT.device)).double().sum()
        self.sums[name] = self.sums.get(name, 0.0) + value
