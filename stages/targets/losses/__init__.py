"""Losses: one class per loss, one line per loss in `LOSSES`.

A loss has a method `value`, the plain formula on dense log-probabilities. Tests compare everything
with it, and autograd can differentiate it. The optional method `gradient` returns the same value
with its gradient in closed form, as `weight * softmax + a few entries`, from a softmax that several
losses share. Losses without it are differentiated by autograd, chunk by chunk.

`loss` makes a function of student logits for your own training loop.

What targets give for each loss (`support`; K is the head, R the number of tail samples):

    loss               K = V   K, R > 0     K = 0, R > 0  K > 0, R = 0
    cross_entropy      exact   exact        exact         exact
    kl                 exact   unbiased     unbiased      lower bound
    reverse_kl         exact   lower bound  refused       lower bound
    jsd                exact   lower bound  refused       lower bound
    total_variation    exact   lower bound  refused       lower bound
    skew_kl            exact   unbiased *   unbiased *    lower bound
    skew_reverse_kl    exact   lower bound  refused       lower bound
    residual_to_label  exact   biased       refused       biased
    chunk_likelihood   exact   exact        exact         exact
    branches           unbiased unbiased    unbiased      biased

    * if the log-probabilities of the samples are stored, as with captured temperatures; otherwise
      a lower bound with a head and refused without one

A store that was imported without the mass outside the head supports `kl` on the head only, at every
temperature, and refuses the other losses that read targets.

The same holds at every captured temperature; other temperatures are refused. A lower bound is the
divergence on the cells "each head token" and "everything else"; it is zero if the student agrees
with the teacher on all cells. "biased" means that the target is not the teacher's distribution.

In a store with a student's tokens (`data/retokenized`) the target is the teacher's distribution
over the student's first tokens. Samples are unbiased there, too; the probabilities of a head are
not all that is known of its tokens, so that "a lower bound" becomes "biased".

`branches` reads words beside the text, which only such a store can have: its targets are those of
`Batch.branches`.

The fields of a loss are its parameters. The recipe's objective sets them by name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from .branches import BranchLikelihood
from .chunks import ChunkLikelihood
from .forward_kl import CrossEntropy, ForwardKL, ResidualToLabel
from .partition import JensenShannon, ReverseKL, SkewKL, SkewReverseKL, TotalVariation

if TYPE_CHECKING:
    import torch

    from ..tensors import TargetTensors
    from .loss import Loss


LOSSES: dict[str, Loss] = {
    "kl": ForwardKL(),
    "cross_entropy": CrossEntropy(),
    "reverse_kl": ReverseKL(),
    "jsd": JensenShannon(),
    "total_variation": TotalVariation(),
    "skew_kl": SkewKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "residual_to_label": ResidualToLabel(),
    "chunk_likelihood": ChunkLikelihood(),
    "branches": BranchLikelihood(),
}


@dataclass(frozen=True, slots=True)
class LossFunction:
    """A loss as a function of student logits, which autograd differentiates."""

    loss: Loss
    temperature: float

    def __call__(self, student_logits: torch.Tensor, targets: TargetTensors) -> torch.Tensor:
        """[M] the loss in nats at each supervised position. In a store with a student's tokens it
        is 0 inside a chunk, unless `loss.inside_chunks` holds.

        student_logits  [M, V] logits at the positions of `targets`, without padding rows: V is
                        `store.manifest.tokenizer.size`

        Raises
            ColdstillError: the targets cannot support the loss at this temperature
        """
        if reason := self.loss.refuse(targets.capture, self.temperature):
            raise ColdstillError(f"losses: {self.loss.name}: {reason}")
        if len(student_logits) != len(targets):
            raise ColdstillError(
                f"losses: {self.loss.name}: logits of shape {tuple(student_logits.shape)}, "
                f"expected ({len(targets)}, V): one row per supervised position"
            )
        logprobs_MV = (student_logits.float() / self.temperature).log_softmax(1)
        rows = targets.rows(0, len(targets))
        value = self.loss.value(logprobs_MV, rows, self.temperature)
        if rows.known is not None and not self.loss.inside_chunks:
            value = value * rows.known
        return value


def loss(name: str, *, temperature: float = 1.0, **parameters: float) -> LossFunction:
    """One of `LOSSES` by name, for a training loop of your own.

        kl = coldstill.losses.loss("kl")
        kl(logits_MV, batch.targets).mean().backward()

    The value has no factor T^2. To keep the scale of the gradient as `coldstill train-student`
    does, multiply it by `temperature ** 2`.

    temperature  a temperature that the store captured, or 1
    parameters   fields of the loss, such as `beta` of "jsd", `skew` of "skew_kl" and `tau` of
                 "chunk_likelihood"

    Raises
        ColdstillError: no loss has this name, it has no such parameter, or the value is not a share
            (of `tau`: not above 0)
    """
    if name not in LOSSES:
        raise ColdstillError(f"losses: {name!r}: expected one of {', '.join(LOSSES)}")
    kind: Any = LOSSES[name]
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := parameters.keys() - set(known):
        raise ColdstillError(
            f"losses: {name} has no parameter {min(unknown)!r}; it has {', '.join(known) or 'none'}"
        )
    for key, value in parameters.items():
        if key == "tau":
            if not 0.0 < value < math.inf:
                raise ColdstillError(f"losses: {name}: tau = {value}: expected more than 0")
        elif not 0.0 <= value <= 1.0:
            raise ColdstillError(f"losses: {name}: {key} = {value}: expected 0 to 1")
    return LossFunction(dataclasses.replace(kind, **parameters), temperature)
