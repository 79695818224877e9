"""The output head, the losses and their gradient in one pass, one chunk of positions at a time.

A usual implementation computes the logits of all positions, keeps them for the backward pass, and
allocates a gradient of the same size. Here the logits of a chunk are turned into their gradient in
place, multiplied into the gradients of hidden states and head, and dropped. No tensor of vocabulary
size outlives its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..targets.softmax import GradientSum, entropies_and_labels, softmaxes_in_place
from ..targets.tensors import tempered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.output_head import OutputHead
    from ..objective_config import WeightConfig
    from ..targets.losses.loss import Loss
    from ..targets.softmax import StudentSoftmax
    from ..targets.tensors import TargetTensors

COUNTS = (
    "teacher_mass", "student_mass", "agreement", "accuracy", "teacher_entropy", "student_entropy",
    "label_loss",
)  # fmt: skip
"""Sums that are returned with every loss: mass inside the head of teacher and student, positions
where teacher and student agree on the most probable token, positions where the student's most
probable token is the label, both entropies and -log q(label) in nats. The last three are at
temperature 1, so that students of different objectives can be compared; the others are at
temperature 1 if a loss uses it, otherwise at the lowest temperature. All use the targets of the
first teacher; inside a chunk of a store with a student's tokens, these say that the label is
certain."""


@dataclass(frozen=True, slots=True)
class Term:
    """One loss of the objective."""

    loss: Loss
    weight: float
    temperature: float = 1.0
    source: int = 0
    """Index in `TargetTensors.sources` of the targets that the loss reads."""
    share: float = 1.0
    """Share of this source, if several teachers are mixed."""
    schedule: WeightConfig | None = None
    """Schedule of the weight, or None if it is constant. `weight` is the current value."""


def chunked_loss(
    head: OutputHead, hidden_MD: torch.Tensor, target: TargetTensors, terms: Sequence[Term]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective summed over M positions, and its parts.

    hidden_MD  hidden states of the supervised positions, in the order of `target`

    Returns the weighted sum, which is differentiable with respect to hidden states, head weight and
    bias and includes the factor T^2 of each loss. Also returns float64 sums by name: each loss
    without its weight, and `COUNTS`. The value of a loss with several sources is the sum of its
    values times their shares; each single value is returned as `NAME_teacher_SOURCE`.
    """
    apply: Any = _ChunkedLoss.apply  # torch leaves it untyped
    total, sums = apply(hidden_MD, head.weight, head.bias, head, target, tuple(terms))
    values = sums.unbind()
    return total, {
        **_by_name(terms, values[: len(terms)]),
        **dict(zip(COUNTS, values[len(terms) :], strict=True)),
    }


def _by_name(terms: Sequence[Term], values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    names = [term.loss.name for term in terms]
    for term, value in zip(terms, values, strict=True):
        name = term.loss.name
        if names.count(name) == 1:
            named[name] = value
        else:
            named[name] = named.get(name, 0.0) + term.share * value
            named[f"{name}_teacher_{term.source}"] = value
    return named


def row_parts(target: TargetTensors, most: int) -> list[slice]:
    """Consecutive parts of at most `most` positions. None begins inside a chunk of text; a chunk
    that is longer is a part of its own."""
    count = len(target)
    if target.begins is None:
        return [slice(at, min(at + most, count)) for at in range(0, count, most)]
    begins = [*torch.nonzero(target.begins)[:, 0].tolist(), count]
    parts, start = [], 0
    for at, following in pairwise(begins):
        if following - start > most and at > start:
            parts.append(slice(start, at))
            start = at
    return [*parts, slice(start, count)] if count else []


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        head: OutputHead,
        target: TargetTensors,
        terms: tuple[Term, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad
        sums = torch.zeros(len(terms) + len(COUNTS), dtype=torch.float64, device=hidden_MD.device)
        states, parts = hidden_MD.detach(), row_parts(target, head.chunk)
        least = max((part.stop - part.start for part in parts), default=0)
        buffer = head.buffer(len(hidden_MD), hidden_MD.device, least=least)
        compute = head.real_weight(hidden_MD.dtype, weight)  # cast once, not once per chunk
        grads = None
        if any(wanted[:3]):
            grads = _Gradients(states, compute, weight, bias, head, wanted)
        # the dtype of the hidden states decides the precision; autocast must not cast again
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for rows in parts:
                logits = head.logits(states[rows], buffer, compute)
                finished = logits.clone() if grads and head.softcap is not None else None
                part, gradient = _chunk(
                    logits, target.rows(rows.start, rows.stop), terms, want=grads is not None
                )
                sums += part
                if grads and gradient is not None:
                    grads.add(rows, gradient, finished)
        ctx.grads = grads
        weights = sums.new_tensor([t.weight * t.share * t.temperature**2 for t in terms])
        ctx.mark_non_differentiable(sums)
        return (sums[: len(terms)] * weights).sum().float(), sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        scale = grad_outputs[0]
        grads: _Gradients = ctx.grads
        ctx.grads = None
        parts = (grads.hidden, grads.weight, grads.bias)
        return (*[None if g is None else g.mul_(scale) for g in parts], None, None, None)


class _Gradients:
    """Sums of the gradients with respect to hidden states, head weight and head bias."""

    def __init__(
        self,
        states_MD: torch.Tensor,
        compute_VD: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        head: OutputHead,
        wanted: Sequence[bool],
    ) -> None:
        self._head, self._states, self._compute = head, states_MD, compute_VD
        self.hidden = torch.empty_like(states_MD) if wanted[0] else None
        # rows beyond the vocabulary are padding and have a gradient of zero
        self.weight = torch.zeros_like(weight) if weight is not None and wanted[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None

    def add(self, rows: slice, gradient_MV: torch.Tensor, finished_MV: torch.Tensor | None) -> None:
        """Propagate the gradient with respect to one chunk's logits through the head."""
        head = self._head
        if head.whole:
            if self.hidden is not None:
                self.hidden[rows] = gradient_MV
            return
        if finished_MV is not None:
            assert head.softcap is not None
            # the derivative of value = c tanh(z / c) is 1 - (value / c)^2
            gradient_MV.mul_(finished_MV.div_(head.softcap).square_().neg_().add_(1.0))
        if head.scale != 1.0:
            gradient_MV.mul_(head.scale)
        assert self._compute is not None
        gradient = gradient_MV.to(self._compute.dtype)
        if self.hidden is not None:
            torch.mm(gradient, self._compute, out=self.hidden[rows])
        if self.weight is not None:
            real = self.weight[: head.vocabulary]
            if real.dtype == gradient.dtype:
                real.addmm_(gradient.t(), self._states[rows])
            else:
                real.add_(gradient.t() @ self._states[rows])
        if self.bias is not None:
            self.bias[: head.vocabulary].add_(gradient_MV.sum(0))


def _chunk(
    logits_MV: torch.Tensor, target: TargetTensors, terms: Sequence[Term], *, want: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums of one chunk and the gradient with respect to its logits, which it overwrites."""
    by_temperature: dict[float, list[Term]] = {}
    for term in terms:
        by_temperature.setdefault(term.temperature, []).append(term)
    values: dict[Term, torch.Tensor] = {}
    counts, gradient = None, None
    plain = None
    if 1.0 not in by_temperature:  # no loss below computes a softmax at temperature 1
        plain = entropies_and_labels(logits_MV, target.labels)
    ordered = sorted(by_temperature.items(), key=lambda item: (item[0] != 1.0, item[0]))
    for index, (temperature, group) in enumerate(ordered):
        last = index == len(by_temperature) - 1
        own = logits_MV if last else logits_MV.clone()
        part, student = _group(own, target, group, temperature, values, want=want)
        if counts is None:
            counts = _counts(student, target, temperature, plain)
        if part is not None:
            gradient = part if gradient is None else gradient.add_(part)
    assert counts is not None
    parts = [values[term].double().sum() for term in terms]
    return torch.stack([*parts, *counts]), gradient


def _group(
    logits_MV: torch.Tensor,
    target: TargetTensors,
    terms: Sequence[Term],
    temperature: float,
    values: dict[Term, torch.Tensor],
    *,
    want: bool,
) -> tuple[torch.Tensor | None, StudentSoftmax]:
    """All losses at one temperature, from one softmax. Overwrites the logits.

    Returns the gradient, and the student's softmax against the first source. The gradient has
    overwritten the probabilities of that softmax.
    """
    if temperature != 1.0:
        logits_MV.div_(temperature)
    # the gradient with respect to the logits has T^2 from the loss and 1/T from the division
    factors = [term.weight * term.share * temperature for term in terms]
    dense = None
    if any(not hasattr(term.loss, "gradient") for term in terms):
        dense = _by_autograd(logits_MV, target, terms, factors, temperature, values, want=want)
    targets = {source: target.sources[source] for source in sorted({0, *(t.source for t in terms)})}
    students = softmaxes_in_place(logits_MV, targets)
    total = GradientSum(students, {source: own.head_ids for source, own in targets.items()})
    for term, factor in zip(terms, factors, strict=True):
        closed_form = getattr(term.loss, "gradient", None)
        if closed_form is not None:
            own = targets[term.source]
            sparse = closed_form(students[term.source], own, temperature)
            if own.known is not None and not term.loss.inside_chunks:
                sparse = sparse.at(own.known, own)
            values[term] = sparse.value
            total.add(term.source, factor, sparse)
    if not want:
        return None, students[0]
    gradient = total.write()
    return gradient if dense is None else gradient.add_(dense), students[0]


def _counts(
    student: StudentSoftmax,
    target: TargetTensors,
    temperature: float,
    plain: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """The sums of `COUNTS`. `plain` holds the student's entropies and label log-probabilities at
    temperature 1 if `student` is at another temperature."""
    entropy_M, label_M = plain or (student.entropy, student.label_logprob)
    # the student's log-probability of the teacher's most probable token; empty without a head
    first = student.head_logprobs[:, :1]
    return [
        tempered(target, temperature).head.double().sum(),
        student.head_logprobs.exp().double().sum(),
        (first >= student.top_logprob[:, None]).double().sum(),
        (student.label_logprob >= student.top_logprob).double().sum(),
        target.entropy.double().sum(),
        entropy_M.double().sum(),
        -label_M.double().sum(),
    ]


def _by_autograd(
    logits_MV: torch.Tensor,
    target: TargetTensors,
    terms: Sequence[Term],
    factors: Sequence[float],
    temperature: float,
    values: dict[Term, torch.Tensor],
    *,
    want: bool,
) -> torch.Tensor | None:
    """Losses without a closed form, differentiated by autograd for this chunk."""
    with torch.set_grad_enabled(want):
        leaf = logits_MV.detach().clone().requires_grad_(want)
        logprobs = leaf.log_softmax(1)
        total = leaf.new_zeros(())
        for term, factor in zip(terms, factors, strict=True):
            if not hasattr(term.loss, "gradient"):
                source = target.sources[term.source]
                value = term.loss.value(logprobs, source, temperature)
                if source.known is not None and not term.loss.inside_chunks:
                    value = value * source.known
                values[term] = value.detach()
                total = total + factor * value.sum()
        return torch.autograd.grad(total, leaf)[0] if want else None
