"""The training objective, attached to the model's forward, and the schedules of its weights.

A weight is a pure function of the step and the number of steps. A resumed run therefore has the
same weights, and processes that train together agree without communication.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...data.errors import ColdstillError
from ..targets.losses import LOSSES
from .batch import Batch
from .chunked_loss import Term, chunked_loss
from .steps import step_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...data.schema import Capture
    from ..models.output_head import OutputHead
    from ..objective_config import ObjectiveConfig, WeightConfig
    from ..targets.losses.loss import Loss


def weight_at(weight: WeightConfig, step: int, steps: int) -> float:
    """The value of a weight in one step.

    step   the step, counted from 0
    steps  steps of the whole training

    `linear` goes from `start` in the first step to `weight` in the last. `wsd` (warm-up, stable,
    decay; as a loss weight: arXiv 2410.16215) rises from `start` to `weight` in
    ceil(warmup * steps) steps, stays constant, and falls to `end` in the last ceil(decay * steps)
    steps.
    """
    if weight.schedule == "constant":
        return weight.weight
    if weight.schedule == "linear":
        return _between(weight.start, weight.weight, step / (steps - 1) if steps > 1 else 1.0)
    rising = step_count(weight.warmup, steps)
    falling = min(step_count(weight.decay, steps), steps - rising)
    if step < rising:
        return _between(weight.start, weight.weight, step / rising)
    if step >= steps - falling:
        return _between(weight.weight, weight.end, (step - (steps - falling) + 1) / falling)
    return weight.weight


def _between(first: float, last: float, part: float) -> float:
    return (1.0 - part) * first + part * last


class CurrentStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The number of the current step. The Trainer sets it before each step."""

    def __init__(self, steps: int) -> None:
        self.step, self.steps = 0, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step


def terms_of(objective: ObjectiveConfig, capture: Capture, where: str) -> list[Term]:
    """The losses of an objective.

    Raises
        ColdstillError: all weights are 0, or the capture cannot support a loss
    """
    terms = []
    for name, table in objective.weights.items():
        kind: Any = LOSSES[name]
        its_own = {field.name for field in dataclasses.fields(kind)}
        given = {key: value for key, value in objective.parameters.items() if key in its_own}
        loss: Loss = dataclasses.replace(kind, **given)
        temperature = objective.temperature if loss.needs_targets else 1.0
        if reason := loss.refuse(capture, temperature):
            raise ColdstillError(f"{where}: {name}: {reason}")
        schedule = None if table.schedule == "constant" else table
        terms.append(Term(loss, table.weight, temperature, schedule=schedule))
    if terms and all(term.loss.beside_text for term in terms):
        raise ColdstillError(
            f"{where}: {terms[0].loss.name} alone teaches nothing of the text; add another loss, "
            "such as kl = 1.0"
        )
    if not terms:
        raise ColdstillError(
            f"{where}: all weights are 0, so there is nothing to learn; give one, such as kl = 1.0"
        )
    return terms


def mixed_terms(
    objective: ObjectiveConfig,
    captures: Sequence[tuple[Capture, str]],
    shares: Sequence[float],
    where: str,
) -> list[Term]:
    """The losses of an objective against the targets of several teachers, weighted by shares.

    For forward KL, `sum_i w_i KL(p_i || q)` equals `KL(sum_i w_i p_i || q)` plus
    `sum_i w_i KL(p_i || sum_j w_j p_j)`, which does not depend on q. So the gradient is that of the
    divergence from the mixture, and the reported value is larger by a constant. Targets with a
    bucket (`tail = 0`) have no mixture, since their buckets hold different tokens, but the sum is
    defined for them too. Other losses are not linear in the teacher: for them the sum is the mean
    divergence from each teacher. A loss that reads no targets counts once.

    captures  capture and name of each store, the name for messages
    shares    share of each store, summing to 1; a store with share 0 is left out

    Raises
        ColdstillError: as `terms_of`, for any of the stores
    """
    terms: list[Term] = []
    for source, ((capture, name), share) in enumerate(zip(captures, shares, strict=True)):
        if share == 0:
            continue
        for term in terms_of(objective, capture, where if source == 0 else f"{where}: {name}"):
            if term.loss.beside_text and shares[0] < sum(shares):
                raise ColdstillError(
                    f"{where}: {term.loss.name} is of the first teacher alone, and others have a "
                    "share: leave it out"
                )
            if term.loss.needs_targets:
                terms.append(dataclasses.replace(term, source=source, share=share))
            elif term not in terms:
                terms.append(term)
    return terms


def expect_weight(terms: Sequence[Term], steps: int, where: str) -> None:
    """Refuse scheduled weights that are 0 in all `steps` steps."""
    for term in terms:
        if term.schedule is None or any(
            weight_at(term.schedule, step, steps) > 0 for step in range(steps)
        ):
            return
    raise ColdstillError(
        f"{where}: all weights are 0 in {'the only step' if steps == 1 else f'all {steps} steps'}, "
        "so there is nothing to learn; change their schedules or train.steps"
    )


def supports(terms: Sequence[Term], captures: Sequence[Capture], vocabulary: int) -> str:
    """How the targets support each loss, such as "kl unbiased, jsd a lower bound".

    captures    capture of each source
    vocabulary  V
    """
    words: dict[str, list[str]] = {}
    for term in terms:
        if term.loss.needs_targets or term.loss.beside_text:
            own = captures[term.source]
            word = term.loss.support(own, term.temperature, vocabulary)
            if own.chunks and word == "a lower bound":
                word = "biased"  # tokens outside the head may map to one inside
            if word not in words.setdefault(term.loss.name, []):
                words[term.loss.name].append(word)
    return ", ".join(f"{name} {' or '.join(found)}" for name, found in words.items())


def terms_at(terms: Sequence[Term], current: CurrentStep) -> list[Term]:
    """The terms with the weights of the current step."""
    return [
        dataclasses.replace(term, weight=weight_at(term.schedule, current.step, current.steps))
        if term.schedule is not None
        else term
        for term in terms
    ]


def attach_objective(
    head: OutputHead, terms: Sequence[Term], current: CurrentStep | None = None
) -> None:
    """Make the model's forward compute the objective when it is called with a `Batch`.

    The forward then returns `loss`, the objective summed over positions, and `sums`, its parts. A
    weight that changes over training is in `sums` too, as `weight_NAME`, times the positions.

    The loss must be computed inside the forward that data-parallel wrappers see. Otherwise they
    would neither gather the head's weights nor average its gradient. The model's own forward stays
    as it was for every other input, so that it saves, loads and generates as before.

    current  the step of the training, for weights that change; without it, the weights are those
             that the objective names
    """
    model = head.model
    own_forward = model.forward

    @functools.wraps(own_forward)
    def forward(*args: Any, **inputs: Any) -> Any:
        if not (args and isinstance(args[0], Batch)):
            return own_forward(*args, **inputs)
        batch = args[0]
        states = head.hidden(batch.inputs).flatten(0, 1)
        if torch.is_autocast_enabled(states.device.type):  # a final norm returns fp32
            states = states.to(torch.get_autocast_dtype(states.device.type))
        hidden = states[batch.positions]
        now = terms if current is None else terms_at(terms, current)
        beside = [term for term in now if term.loss.beside_text]
        of_text = [term for term in now if not term.loss.beside_text]
        loss, sums = chunked_loss(head, hidden, batch.targets, of_text)
        if beside:
            assert batch.branches is not None  # their loss refuses a store without branches
            read = states[batch.branches.positions]
            more, parts = chunked_loss(head, read, batch.branches.targets, beside)
            loss = loss + more
            sums |= {term.loss.name: parts[term.loss.name] for term in beside}
        # times the positions, so that the mean per position is the weight
        changing = {
            f"weight_{term.loss.name}": loss.new_tensor(
                term.weight * len(hidden), dtype=torch.float64
            )
            for term in now
            if term.schedule is not None
        }
        return {"loss": loss, "sums": sums | changing}

    model.forward = forward
