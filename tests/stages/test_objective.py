"""The objective inside a model's forward, and weights that change over training."""

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
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig, WeightConfig
from coldstill.stages.training.batch import Batch, collate
from coldstill.stages.training.chunked_loss import COUNTS
from coldstill.stages.training.objective import (
    CurrentStep,
    attach_objective,
    terms_at,
    terms_of,
    weight_at,
)
from conftest import FAMILIES, VOCABULARY, make_model
from pydantic import TypeAdapter, ValidationError
from small_trainings import read_metrics, train_small

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Sequences
    from coldstill.data.store.reader import StoreReader


CAPTURE = Capture(head=4, tail=3)
OBJECTIVE = ObjectiveConfig(cross_entropy=0.3)


def packed(change_unlearned: int = 0) -> Sequences:
    """Prompts, answers and an unlearned end, which may be changed."""
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
def test_unsupervised_tokens_and_padding_change_nothing_bit_for_bit(family: str) -> None:
    model, sequences = model_with_objective(family), packed()
    batch, changed = batch_of(sequences), batch_of(packed(change_unlearned=11))
    before, ids = loss_and_gradients(model, batch), batch.inputs["input_ids"]
    assert not torch.equal(changed.inputs["input_ids"], ids)
    expect_equal(loss_and_gradients(model, changed), before)
    padding = torch.arange(ids.shape[1]) >= torch.from_numpy(sequences.tokens.lengths)[:, None]
    padded = replace(batch, inputs=batch.inputs | {"input_ids": ids.masked_fill(padding, 57)})
    assert not torch.equal(padded.inputs["input_ids"], ids)
    expect_equal(loss_and_gradients(model, padded), before)


def test_every_part_of_the_targets_changes_the_gradient() -> None:
    model, batch = model_with_objective(), batch_of(packed())
    before = loss_and_gradients(model, batch)
    old = batch.targets
    for change in (
        {"targets": replace(old, labels=old.labels.roll(1))},
        {"targets": replace(old, head_ids=old.head_ids.roll(1, 0))},
        {"targets": replace(old, tail=replace(old.tail, ids=old.tail.ids.roll(1)))},
        {"targets": replace(old, tail=replace(old.tail, counts=old.tail.counts + 1))},
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

    message = refused(ObjectiveConfig(temperature=2.0), CAPTURE)
    assert message.startswith("students.a.objective: kl: temperature 2.0 was not captured")
    message = refused(ObjectiveConfig(), Capture(head=0, tail=0))
    assert message.startswith("students.a.objective: kl: the store kept neither head nor tail")
    message = refused(ObjectiveConfig(kl=0.0, cross_entropy=0.0), CAPTURE)
    assert message == (
        "students.a.objective: all weights are 0, so there is nothing to learn; give one, such as "
        "kl = 1.0"
    )


ADAPTER: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)


def over(weight: WeightConfig, steps: int) -> list[float]:
    return [weight_at(weight, step, steps) for step in range(steps)]


def test_each_schedule_has_its_weights() -> None:
    assert over(WeightConfig(weight=0.7), 3) == [0.7, 0.7, 0.7]
    falling = WeightConfig(weight=0.2, schedule="linear", start=1.0)
    assert over(falling, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert over(falling, 1) == [0.2]  # the first step is also the last
    wsd = WeightConfig(weight=0.9, schedule="wsd", warmup=0.3, decay=0.2, end=0.1)
    assert over(wsd, 10) == pytest.approx([0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.1])
    rounded = WeightConfig(weight=1.0, schedule="wsd", warmup=0.07, decay=0.0)
    assert 0.07 * 100 > 7  # in binary; a rounding error is not a step
    assert over(rounded, 100).index(1.0) == 7


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_a_weight_stays_between_its_ends(warmup: float, decay: float, steps: int) -> None:
    weight = WeightConfig(
        weight=0.9, schedule="wsd", start=0.2, end=0.1, warmup=warmup, decay=decay
    )
    weights = over(weight, steps)
    assert min(weights) >= 0.1
    assert max(weights) <= 0.9 + 1e-12
    if decay and steps > 1:
        assert weights[-1] == pytest.approx(0.1)
    if warmup:
        assert weights[0] == pytest.approx(0.2)


def test_a_constant_weight_is_stored_as_a_number() -> None:
    plain = ADAPTER.validate_python({"kl": {"weight": 0.5, "schedule": "constant"}})
    assert plain.kl == 0.5
    changing = ADAPTER.validate_python({"kl": {"weight": 0.5, "schedule": "linear", "start": 1}})
    assert changing.kl == WeightConfig(weight=0.5, schedule="linear", start=1.0)
    again = ADAPTER.validate_json(ADAPTER.dump_json(changing))
    assert again == changing


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"weight": 1.0, "start": 0.5}, "start belongs to schedule 'linear' or 'wsd'"),
        ({"weight": 1.0, "schedule": "linear", "end": 0.5}, "end belongs to schedule 'wsd'"),
        (
            {"weight": 1.0, "schedule": "wsd", "warmup": 0.7, "decay": 0.6},
            "are shares of the same steps",
        ),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"schedule": "wsd"}, "missing|Field required|required"),
        ({"weight": 1.0, "schedule": "cosine"}, "'constant', 'linear' or 'wsd'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python({"kl": weight})


def test_a_loss_is_used_if_its_weight_is_ever_positive(store: StoreReader) -> None:
    weights = {
        "kl": {"weight": 0.0, "schedule": "linear", "start": 1.0},
        "cross_entropy": {"weight": 1.0, "schedule": "linear", "start": 0.0},
        "jsd": {"weight": 0.0, "schedule": "wsd"},
    }
    objective = ADAPTER.validate_python(weights)
    terms = terms_of(objective, store.manifest.capture, "here")
    assert [term.loss.name for term in terms] == ["kl", "cross_entropy"]
    current = CurrentStep(3)
    seen = []
    for current.step in range(3):
        seen.append([term.weight for term in terms_at(terms, current)])
    assert seen == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_training_follows_the_schedule_and_records_it(store: StoreReader, tmp_path: Path) -> None:
    objective = ObjectiveConfig(
        kl=WeightConfig(weight=0.25, schedule="linear", start=1.0), cross_entropy=0.5
    )
    train_small(store, tmp_path / "whole", steps=4, objective=objective)
    lines = read_metrics(tmp_path / "whole")
    assert [line["weight_kl"] for line in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    for line in lines:
        expected = line["weight_kl"] * line["kl"] + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_schedule_resumes_with_the_training(store: StoreReader, tmp_path: Path) -> None:
    """From a checkpoint the weights are those of an uninterrupted training, bit for bit."""
    settings: dict[str, Any] = {
        "steps": 4,
        "checkpoint_every": 2,
        "objective": ObjectiveConfig(kl=WeightConfig(weight=0.25, schedule="linear", start=1.0)),
    }
    whole = train_small(store, tmp_path / "run", **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in sorted(checkpoints.glob("checkpoint-4/*")):
        path.unlink()
    (checkpoints / "checkpoint-4").rmdir()
    again = train_small(store, tmp_path / "run", **settings)
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
