"""The objective inside a model's forward: nothing but supervised positions counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Targets
from coldstill.stages.config import ObjectiveConfig
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.training.chunked_loss import COUNTS
from coldstill.stages.training.feed import Batch, collate
from coldstill.stages.training.objective import attach_objective, terms_of
from conftest import FAMILIES, VOCABULARY, make_model

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences

CAPTURE = Capture(head=4, tail=3)
OBJECTIVE = ObjectiveConfig(cross_entropy=0.3)


def packed(change_unlearned: int = 0) -> Sequences:
    """Prompts, answers and a trailing part that nobody learns; unlearned ends may be changed."""
    random = np.random.default_rng(0)
    rows = []
    for row in ([(9, 4, 7)], [(5, 6, 0), (3, 8, 9)], [(2, 20, 3)]):
        pieces = []
        for prompt, answer, trailing in row:
            length = prompt + answer + trailing
            tokens_T = random.integers(0, VOCABULARY, length).astype(np.int32)
            learned_T = np.zeros(length, np.bool_)
            learned_T[prompt : prompt + answer] = True
            # after the last label: no supervised position can see these
            changed = slice(prompt + answer, length)
            tokens_T[changed] = (tokens_T[changed] + change_unlearned) % VOCABULARY
            pieces.append(TokenizedDocument(0, tokens_T, learned_T))
        rows.append(pieces)
    return build_sequences(0, rows)


def targets_of(count: int) -> Targets:
    random = torch.Generator().manual_seed(0)
    logits_MV = torch.randn(count, VOCABULARY, generator=random) * 3
    shifts_M = torch.rand(count, generator=random, dtype=torch.float64)
    record = dense.record(logits_MV, torch.zeros(count, dtype=torch.long), shifts_M, CAPTURE)
    return record.to_targets()


def model_with_objective(name: str = "llama", objective: ObjectiveConfig = OBJECTIVE) -> Any:
    model = make_model(name, VOCABULARY + 16)
    terms = terms_of(objective, CAPTURE, "students.a.objective")
    attach_objective(connect_head(model, VOCABULARY), terms)
    return model


def block_of(sequences: Sequences) -> Block:
    targets = targets_of(len(sequences.positions.values))
    return Block(sequences=sequences, targets=targets, capture=CAPTURE)


def batch_of(sequences: Sequences) -> Batch:
    return collate((block_of(sequences),))


def loss_and_gradients(model: Any, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(batch)["loss"]
    torch.autograd.backward(loss)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def expect_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_unsupervised_tokens_change_nothing_bit_for_bit(family: str) -> None:
    model = model_with_objective(family)
    before = loss_and_gradients(model, batch_of(packed()))
    changed = batch_of(packed(change_unlearned=11))
    assert not torch.equal(changed.inputs["input_ids"], batch_of(packed()).inputs["input_ids"])
    expect_equal(loss_and_gradients(model, changed), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_bit_for_bit(family: str) -> None:
    model, sequences = model_with_objective(family), packed()
    batch = batch_of(sequences)
    before = loss_and_gradients(model, batch)
    length = batch.inputs["input_ids"].shape[1]
    padding = torch.arange(length) >= torch.from_numpy(sequences.tokens.lengths)[:, None]
    assert padding.any()
    other = batch.inputs["input_ids"].masked_fill(padding, 57)
    assert not torch.equal(other, batch.inputs["input_ids"])
    expect_equal(
        loss_and_gradients(model, replace(batch, inputs=batch.inputs | {"input_ids": other})),
        before,
    )


def test_every_part_of_the_targets_changes_the_gradient() -> None:
    model, batch = model_with_objective(), batch_of(packed())
    before = loss_and_gradients(model, batch)
    old = batch.targets
    for change in (
        {"targets": replace(old, labels=old.labels.roll(1))},
        {"targets": replace(old, head_ids=old.head_ids.roll(1, 0))},
        {"targets": replace(old, tail_ids=old.tail_ids.roll(1, 0))},
        {"targets": replace(old, log_tail=old.log_tail - 0.1)},
        {"positions": batch.positions - 1},
    ):
        changed: Any = change
        after = loss_and_gradients(model, replace(batch, **changed))
        assert not torch.equal(after[-1], before[-1]), change


def test_the_loss_is_a_sum_over_positions() -> None:
    model, sequences = model_with_objective(), packed()
    block = block_of(sequences)
    whole = model(collate((block,)))
    added, counted = 0.0, 0
    for row in range(len(sequences)):
        rows = np.array([row])
        part = block.take(rows)
        added += float(model(collate((part,)))["loss"].detach())
        counted += len(part.targets)
    assert float(whole["loss"].detach()) == pytest.approx(added, rel=1e-5)
    assert counted == 4 + 6 + 8 + 20
    assert whole["sums"].keys() == {
        "kl", "cross_entropy", *COUNTS,
    }  # fmt: skip


def test_without_positions_the_forward_is_the_models_own() -> None:
    plain, model = make_model("llama", VOCABULARY + 16), model_with_objective()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 15)


def test_an_unsupported_objective_is_refused_with_its_place() -> None:
    def refused(objective: ObjectiveConfig, capture: Capture) -> str:
        with pytest.raises(ColdstillError) as error:
            terms_of(objective, capture, "students.a.objective")
        return str(error.value)

    told = refused(ObjectiveConfig(temperature=2.0), CAPTURE)
    assert told.startswith("students.a.objective: kl: temperature 2.0 was not captured")
    told = refused(ObjectiveConfig(), Capture(head=0, tail=0))
    assert told.startswith("students.a.objective: kl: the store kept neither head nor tail")
    told = refused(ObjectiveConfig(kl=0.0, cross_entropy=0.0), CAPTURE)
    assert told == (
        "students.a.objective: all weights are 0, so there is nothing to learn; give one, such as "
        "kl = 1.0"
    )


def test_a_temperature_is_the_teachers_and_not_the_labels() -> None:
    capture = Capture(temperatures=(2.0,))
    objective = ObjectiveConfig(kl=0.5, cross_entropy=0.25, temperature=2.0)
    terms = terms_of(objective, capture, "a")
    assert [(t.loss.name, t.weight, t.temperature) for t in terms] == [
        ("kl", 0.5, 2.0), ("cross_entropy", 0.25, 1.0),
    ]  # fmt: skip
