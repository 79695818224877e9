"""Words beside the text: models read them as a text that goes on, and students learn from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.branches import Branches
from coldstill.data.maintenance.retokenize import retokenize
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.models import output_head
from coldstill.stages.models.branching import branch_inputs, expect_branching
from coldstill.stages.models.inputs import attention_windows, model_inputs
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig, WeightConfig
from coldstill.stages.targets import losses
from coldstill.stages.train_student import _report_chunks
from coldstill.stages.training.batch import collate
from coldstill.stages.training.objective import attach_objective, mixed_terms, terms_of
from conftest import FAMILIES, VOCABULARY, make_model
from oracles import VOCABULARY as SMALL
from oracles import random_block, random_branches
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coldstill.data.schema import Sequences
    from coldstill.stages.report import Report

pytest_plugins = ("retokenized_stores",)
CAPTURE = Capture(head=4, tail=3, branches=True)
LENGTH = 48
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [float(factor) for factor in range(4, 12)],
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 32,
}


def words(branches: Branches) -> Iterator[tuple[int, int, list[int], float]]:
    """Sequence, place, tokens and weight of each branch."""
    for row in range(len(branches)):
        start = 0
        for place, size, weight in zip(
            branches.places[row], branches.sizes[row], branches.weights[row], strict=True
        ):
            yield (
                row,
                int(place),
                branches.tokens[row][start : start + size].tolist(),
                float(weight),
            )
            start += size


def text_before(sequences: Sequences, row: int, place: int) -> list[int]:
    """The tokens of a document up to a place."""
    starts = sequences.document_starts[row]
    found: list[int] = sequences.tokens[row][starts[starts <= place].max() : place + 1].tolist()
    return found


def slow_loss(model: Any, block: Block) -> torch.Tensor:
    """One text that goes on with a branch after the other, one token after the other."""
    branches = block.sequences.branches
    assert branches is not None
    total = torch.zeros((), dtype=torch.float64)
    for row, place, word, weight in words(branches):
        for known in range(1, len(word)):
            text = text_before(block.sequences, row, place) + word[:known]
            logits_V = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1, :SMALL]
            total = total - weight * logits_V.double().log_softmax(0)[word[known]]
    return total


def window_of(size: int, *kinds: str) -> dict[str, Any]:
    """Settings of a model with a sliding window in the layers of these kinds."""
    found: dict[str, Any] = {"sliding_window": size}
    if kinds:
        found["layer_types"] = [f"{kind}_attention" for kind in kinds]
    return found


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
WINDOWED: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("phi3", {}),
    ("starcoder2", {}),
    *(
        (family, window_of(4, *kinds) | more)
        for family, more in (
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
            ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
            ("gemma2", {}),
            ("gemma3_text", {}),
            ("gpt_oss", EXPERTS),
            ("olmo3", {}),
            ("cohere2", {}),
            ("ministral", {"head_dim": 16}),
        )
        for kinds in (("sliding", "full"), ("sliding", "sliding"))
    ),
]
"""Families whose layers see a part of the text, in all layers or in one of two."""


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), *((f, window_of(4) | more) for f, more in WINDOWED)],
)
def test_a_branch_has_the_states_of_a_text_that_goes_on_with_it(
    family: str, settings: dict[str, Any]
) -> None:
    model = make_model(family, VOCABULARY, **settings)
    model.set_attn_implementation("eager")
    head = connect_head(model, VOCABULARY)
    sequences = random_block(3, 5, CAPTURE).sequences
    branches = sequences.branches
    assert branches is not None
    windows = attention_windows(model.config)
    found = branch_inputs(sequences, branches, model.dtype, windows)
    with torch.no_grad():
        states = head.hidden(found.inputs)
        text = head.hidden(model_inputs(sequences, "mask", model.dtype, windows))
    width = text.shape[1]
    real = torch.arange(width) < torch.from_numpy(sequences.tokens.lengths)[:, None]
    torch.testing.assert_close(states[:, :width][real], text[real], atol=1e-5, rtol=1e-4)
    if settings:  # otherwise the window would make no difference
        whole = head.hidden(branch_inputs(sequences, branches, model.dtype).inputs)
        assert not torch.allclose(whole[found.row_X, found.column_X],
                                  states[found.row_X, found.column_X], atol=1e-3)  # fmt: skip
    read = iter(states[found.row_X, found.column_X])
    labels = iter(found.labels_X.tolist())
    for row, place, word, _ in words(branches):
        tokens = text_before(sequences, row, place) + word[:-1]
        with torch.no_grad():
            alone = head.hidden({"input_ids": torch.tensor([tokens])})[0]
        for back in range(len(word) - 1, 0, -1):
            torch.testing.assert_close(next(read), alone[-back], atol=1e-5, rtol=1e-4)
            assert next(labels) == word[len(word) - back]
    assert next(read, None) is None


@pytest.mark.parametrize("chunk", [3, 10_000])
def test_the_loss_and_its_gradient_are_those_of_a_slow_loop(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * SMALL)
    block = random_block(5, 4, CAPTURE)
    objective = ObjectiveConfig(kl=0.7, branches=0.3)
    model = make_model("llama", VOCABULARY)
    attach_objective(connect_head(model, SMALL), terms_of(objective, CAPTURE, "test"))
    batch = collate((block,), branches=True)
    found = model(batch)
    found["loss"].backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    other = make_model("llama", VOCABULARY)
    attach_objective(connect_head(other, SMALL), terms_of(ObjectiveConfig(kl=0.7), CAPTURE, "t"))
    plain = other(collate((block,)))
    beside = slow_loss(other, block)
    (plain["loss"] + 0.3 * beside).backward()
    assert float(found["sums"]["branches"]) == pytest.approx(float(beside.detach()), rel=1e-5)
    assert float(found["sums"]["kl"]) == pytest.approx(float(plain["sums"]["kl"]), rel=1e-5)
    assert float(found["sums"]["label_loss"]) == pytest.approx(
        float(plain["sums"]["label_loss"]), rel=1e-5
    )
    for name, each in other.named_parameters():
        torch.testing.assert_close(gradients[name], each.grad, atol=2e-5, rtol=1e-3)


def test_the_loss_is_a_function_of_logits_too() -> None:
    block = random_block(5, 4, CAPTURE)
    batch = collate((block,), branches=True)
    assert batch.branches is not None
    targets = batch.branches.targets
    assert targets.weights is not None
    logits_MV = torch.randn(len(targets), SMALL, dtype=torch.float64)
    value = losses.loss("branches")(logits_MV, targets)
    own = logits_MV.log_softmax(1)[torch.arange(len(targets)), targets.labels.long()]
    torch.testing.assert_close(value.double(), -own * targets.weights, atol=1e-5, rtol=1e-5)
    line = refusal(losses.loss("branches"), torch.zeros(len(batch.targets), SMALL), batch.targets)
    assert line.startswith("branches: these are targets of the text; its own are those of batch.b")
    moved = batch.to("cpu")
    assert moved.branches is not None
    assert torch.equal(moved.branches.positions, batch.branches.positions)


def test_sequences_without_any_branch_are_read_as_they_are() -> None:
    block = random_block(5, 4, CAPTURE)
    empty = Ragged(np.zeros(0, np.int32), np.zeros(5, np.int64))
    weights = Ragged(np.zeros(0, np.float32), np.zeros(5, np.int64))
    none = Branches(places=empty, sizes=empty, tokens=empty, weights=weights)
    block = replace(block, sequences=replace(block.sequences, branches=none))
    model = make_model("llama", VOCABULARY)
    terms = terms_of(ObjectiveConfig(branches=1.0), CAPTURE, "test")
    attach_objective(connect_head(model, SMALL), terms)
    found = model(collate((block,), branches=True))
    assert float(found["sums"]["branches"]) == 0.0
    found["loss"].backward()
    plain = collate((block,))
    assert plain.branches is None
    assert collate((random_block(5, 4, Capture()),), branches=True).branches is None


def test_a_falling_weight_falls_for_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    from coldstill.stages.training.objective import CurrentStep

    falling = WeightConfig(weight=0.0, start=2.0, schedule="linear")
    current = CurrentStep(5)
    block = random_block(5, 4, CAPTURE)
    model = make_model("llama", VOCABULARY)
    terms = terms_of(ObjectiveConfig(branches=falling), CAPTURE, "test")
    attach_objective(connect_head(model, SMALL), terms, current)
    batch = collate((block,), branches=True)
    values = []
    for current.step in range(5):
        found = model(batch)
        beside = float(found["loss"].detach()) - float(found["sums"]["kl"].detach())
        values.append(beside / float(found["sums"]["branches"]))
    np.testing.assert_allclose(values, [2.0, 1.5, 1.0, 0.5, 0.0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_attention_read_branches(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, VOCABULARY)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # capped scores
    expect_branching(connect_head(model.to(dtype), VOCABULARY), LENGTH, "x")


@pytest.mark.parametrize(("family", "settings"), WINDOWED)
def test_models_with_sliding_windows_read_branches(family: str, settings: dict[str, Any]) -> None:
    model = make_model(family, VOCABULARY, **(settings | {"sliding_window": 16}))
    if family in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")
    expect_branching(connect_head(model, VOCABULARY), LENGTH, "x")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mamba", {"state_size": 4, "expand": 2}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("falcon", {"alibi": True}),
        # a branch would not have the frequencies of the long document that it leaves
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
        # windows and tables that count columns, and not positions
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 16},
        ),
        (
            "gpt_neo",
            {
                "attention_types": [[["global", "local"], 1]],
                "num_layers": 2,
                "window_size": LENGTH + 9,
            },
        ),
        (
            "gpt_neo",
            {
                "attention_types": [[["global"], 2]],
                "num_layers": 2,
                "max_position_embeddings": LENGTH,
            },
        ),
    ],
)
def test_models_that_read_branches_otherwise_are_refused(
    family: str, settings: dict[str, Any]
) -> None:
    model = make_model(family, VOCABULARY, **settings)
    line = refusal(expect_branching, connect_head(model, VOCABULARY), LENGTH, "students.a")
    kind = model.config.model_type
    # what the library said, if it refused the arguments
    begin = (
        f"students.a: a {kind!r} model does not read branches as it reads a text, so it cannot "
        "learn from them"
    )
    said = line.removeprefix(begin).removesuffix("; take branches out of the objective")
    assert line == f"{begin}{said}; take branches out of the objective"
    assert not said or (said.startswith(" (") and said.endswith(")") and len(said) > 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_that_could_be_rounding_is_found(dtype: torch.dtype) -> None:
    """A new model may show little of what it will do after training."""
    model = make_model("lfm2", VOCABULARY, layer_types=["conv", "full_attention"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1 if dtype == torch.float32 else 0.5)
    line = refusal(expect_branching, connect_head(model.to(dtype), VOCABULARY), LENGTH, "s")
    assert line.startswith("s: a 'lfm2' model does not read branches as it reads a text")


def test_a_lack_of_memory_says_nothing_of_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    head = connect_head(make_model("llama", VOCABULARY), VOCABULARY)

    def short(*inputs: Any, **_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(output_head.OutputHead, "hidden", short)
    line = refusal(expect_branching, head, LENGTH, "students.a.objective")
    assert line.startswith("students.a.objective: not enough memory on cpu to test how the model")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"n_positions": LENGTH}),
        ("opt", {"max_position_embeddings": LENGTH}),
        ("mistral", {"sliding_window": LENGTH + 4}),
        ("phi3", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": LENGTH},
                  "original_max_position_embeddings": LENGTH}),
    ],
)  # fmt: skip
def test_models_whose_context_is_the_sequence_length_read_branches(
    family: str, settings: dict[str, Any]
) -> None:
    model = make_model(family, VOCABULARY, **settings)
    expect_branching(connect_head(model, VOCABULARY), LENGTH, "x")


def test_objectives_that_branches_do_not_fit_are_refused() -> None:
    objective = ObjectiveConfig(branches=1.0)
    line = refusal(terms_of, objective, Capture(tail=3), "s")
    assert "with the teacher's tokens every word is one token: leave it out" in line
    line = refusal(terms_of, objective, Capture(tail=3, chunks=True), "s")
    assert "the store has no branches: set retokenize.branches above 0" in line
    alone = ObjectiveConfig(kl=0.0, branches=1.0)
    line = refusal(terms_of, alone, CAPTURE, "s")
    assert line == (
        "s: branches alone teaches nothing of the text; add another loss, such as kl = 1.0"
    )
    both = [(CAPTURE, "one"), (CAPTURE, "two")]
    for shares in ([0.5, 0.5], [0.0, 1.0]):  # a batch has the branches of the first store
        line = refusal(mixed_terms, objective, both, shares, "s")
        assert line.startswith("s")
        assert line.endswith(
            ": branches is of the first teacher alone, and others have a share: leave it out"
        )
    assert len(mixed_terms(objective, both, [1.0, 0.0], "s")) == 2


def test_a_student_that_spells_no_word_with_several_tokens_is_warned(
    folder: Path, stores: Callable[..., str], tmp_path: Path
) -> None:
    said: list[Report] = []
    for name, warned in (("added", True), ("bytes", False)):
        retokenize(stores("samples"), str(tmp_path / name), folder / name)
        store = open_store(tmp_path / name)
        terms = terms_of(ObjectiveConfig(branches=1.0), store.manifest.capture, "s")
        said.clear()
        _report_chunks(terms, store, "s", said.append)
        line = "branches learns nothing: the student spells none of the teacher's words with"
        assert any(each.note.startswith(line) and each.warning for each in said) is warned


def test_weights_sum_in_the_metrics_as_they_do_in_the_store() -> None:
    block = random_block(5, 4, CAPTURE)
    batch = collate((block,), branches=True)
    assert batch.branches is not None
    weights = batch.branches.targets.weights
    branches = block.sequences.branches
    assert weights is not None
    assert branches is not None
    expected = sum(weight * (len(word) - 1) for _, _, word, weight in words(branches))
    assert math.isclose(float(weights.sum()), expected, rel_tol=1e-5)
    assert random_branches(5, block.sequences).places.values.tolist() == (
        branches.places.values.tolist()
    )


def test_the_speed_of_a_training_counts_the_tokens_of_the_text() -> None:
    block = random_block(5, 4, CAPTURE)
    plain, beside = collate((block,)), collate((block,), branches=True)
    assert beside.inputs["input_ids"].numel() > plain.inputs["input_ids"].numel()
    assert plain.text_tokens == beside.text_tokens == plain.inputs["input_ids"].numel()
