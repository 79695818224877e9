"""Documents that share a sequence have the states that each of them has alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.stages.models.isolation import model_inputs
from coldstill.stages.models.isolation_choice import choose_isolation
from conftest import FAMILIES, VOCABULARY, make_model
from dense import documents

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.data.schema import Sequences
    from coldstill.stages.models.isolation import Isolation

LENGTH = 48
LENGTHS = [[5, 17, 1, 12], [40], [2, 2, 30], [11, 36, 1]]
"""Document lengths of each sequence; most sequences need padding."""
MODELS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")  # capped scores: transformers refuses
]


def packed(lengths: list[list[int]] = LENGTHS, seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    rows = []
    for row in lengths:
        tokens = [random.integers(0, VOCABULARY, length).astype(np.int32) for length in row]
        rows.append([TokenizedDocument(0, t, np.ones(len(t), np.bool_)) for t in tokens])
    return build_sequences(0, rows)


def load(family: str, attention: str) -> Any:
    model = make_model(family, VOCABULARY)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    return model


@torch.no_grad()
def hidden(model: Any, sequences: Sequences, way: Isolation) -> torch.Tensor:
    inputs = model_inputs(sequences, way, model.dtype)
    states: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def expect_isolated(
    model: Any, way: Isolation, sequences: Sequences, tolerance: float = 1e-5
) -> None:
    states = hidden(model, sequences, way)
    for row, start, end in documents(sequences):
        tokens = torch.from_numpy(sequences.tokens[row][start:end].astype(np.int64))
        alone = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        error = float((states[row, start:end] - alone).abs().max() / alone.abs().max())
        assert error < tolerance, (row, start, error)


@pytest.mark.parametrize(("family", "attention"), MODELS)
def test_packed_documents_have_their_own_states_and_do_not_affect_each_other(
    family: str, attention: str
) -> None:
    model, sequences = load(family, attention), packed()
    way = choose_isolation(model, VOCABULARY, LENGTH)
    assert way == "positions"
    expect_isolated(model, way, sequences)
    before = hidden(model, sequences, way)
    # without isolation the later documents differ
    tokens = torch.from_numpy(sequences.tokens[0].astype(np.int64))
    with torch.no_grad():
        leaky = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    assert float((leaky - before[0, : len(tokens)])[22:].abs().max()) > 1e-2
    # a changed document leaves all others bit-identical
    for changed in documents(sequences):
        row, start, end = changed
        tokens = sequences.tokens.values.copy()
        first = sequences.tokens.offsets[row]
        tokens[first + start : first + end] = (tokens[first + start : first + end] + 7) % VOCABULARY
        other = packed()
        other.tokens.values[:] = tokens
        after = hidden(model, other, "positions")
        assert not torch.equal(after[row, start:end], before[row, start:end])
        for other_row, begin, stop in documents(sequences):
            if (other_row, begin, stop) != changed:
                assert torch.equal(after[other_row, begin:stop], before[other_row, begin:stop])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_explicit_mask_isolates_too(family: str, attention: str) -> None:
    expect_isolated(load(family, attention), "mask", packed())


def test_a_sliding_window_shorter_than_the_sequence_is_kept() -> None:
    model = make_model("mistral", VOCABULARY, sliding_window=8)
    assert choose_isolation(model, VOCABULARY, LENGTH) == "positions"
    expect_isolated(model, "positions", packed())


class Wrapped(torch.nn.Module):
    """A model whose forward drops or changes its arguments."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.model, self.config, self.change = model, model.config, change
        self.dtype, self.device = model.dtype, model.device

    def forward(self, **inputs: Any) -> Any:
        return self.model(**self.change(inputs))


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Drop the arguments of these names."""

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k not in names}

    return change


def mask_alone(inputs: dict[str, Any]) -> dict[str, Any]:
    """Follow restarted positions only together with a mask."""
    return inputs if "attention_mask" in inputs else without("position_ids")(inputs)


def cached(inputs: dict[str, Any]) -> dict[str, Any]:
    """Always keep a cache, which makes restarted positions leak."""
    return without("attention_mask")(inputs) | {"use_cache": True}


def refusing(inputs: dict[str, Any]) -> dict[str, Any]:
    raise TypeError(f"forward() got unexpected keyword arguments {sorted(inputs)}")


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (without("position_ids", "attention_mask"), "single"),
        (cached, "single"),
        (refusing, "single"),
        (mask_alone, "mask"),
    ],
    ids=["ignores both", "keeps a cache", "rejects both", "follows the mask"],
)
def test_the_model_decides_how_documents_are_isolated(change: Any, way: Isolation) -> None:
    model = Wrapped(make_model("llama", VOCABULARY), change)
    assert choose_isolation(model, VOCABULARY, LENGTH) == way


def test_a_mask_that_would_replace_a_sliding_window_is_not_used() -> None:
    model = Wrapped(make_model("mistral", VOCABULARY), mask_alone)
    assert choose_isolation(model, VOCABULARY, 64) == "mask"
    assert choose_isolation(model, VOCABULARY, 65) == "single"


def test_a_leak_below_the_rounding_of_other_kernels_is_found() -> None:
    """Single documents may run other kernels, two batches of one shape may not."""

    class Leaking(Wrapped):
        def forward(self, **inputs: Any) -> Any:
            states = super().forward(**inputs).hidden_states[-1]
            return SimpleNamespace(hidden_states=[states + 2e-6 * states.cumsum(1)])

    model = Leaking(make_model("llama", VOCABULARY), without())
    assert choose_isolation(model, VOCABULARY, LENGTH) == "single"


def test_a_recurrent_state_is_found() -> None:
    """A recurrent model accepts the arguments and lets documents see earlier ones."""

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = make_model("llama", VOCABULARY).config
            self.embed = torch.nn.Embedding(VOCABULARY, 8)
            self.cells = torch.nn.GRU(8, 8, batch_first=True)
            self.dtype, self.device = torch.float32, torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(hidden_states=[self.cells(self.embed(input_ids))[0]])

    torch.manual_seed(0)
    assert choose_isolation(Recurrent(), VOCABULARY, LENGTH) == "single"


def test_positions_restart_and_padding_is_a_separate_document() -> None:
    sequences = packed([[3, 2], [4]])
    inputs = model_inputs(sequences, "positions", torch.float32)
    assert inputs.keys() == {"input_ids", "position_ids"}
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert inputs["input_ids"][1].tolist() == [*sequences.tokens[1].tolist(), 0]
    mask = model_inputs(sequences, "mask", torch.float32)["attention_mask"]
    assert mask.shape == (2, 1, 5, 5)
    seen = (mask[:, 0] == 0).int().tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert seen[1][4] == [0, 0, 0, 0, 1]
