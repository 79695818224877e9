"""A model that is split at its head computes the same logits as the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.stages.models.output_head import OutputHead, connect_head
from conftest import FAMILIES, VOCABULARY, make_model
from torch import nn

if TYPE_CHECKING:
    from coldstill.stages.report import Report

PADDED = VOCABULARY + 16


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def both(model: Any, head: OutputHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits and the model's for the real vocabulary."""
    inputs = {"input_ids": tokens()}
    hidden_MD = head.hidden(inputs).flatten(0, 1)
    ours = head.logits(hidden_MD, head.buffer(len(hidden_MD), hidden_MD.device)).clone()
    theirs = model(**inputs, use_cache=False).logits[..., :VOCABULARY].flatten(0, 1)
    return ours, theirs


def expect_same(model: Any, head: OutputHead, tolerance: float) -> None:
    ours, theirs = both(model, head)
    assert ours.dtype == torch.float32
    assert ours.shape == (40, VOCABULARY)
    error = float((ours - theirs.float()).abs().max() / theirs.abs().max())
    assert error < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_whole_logits_agree(family: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model, warnings = make_model(family, PADDED).to(dtype), list[Any]()
        head = connect_head(model, VOCABULARY, warnings.append)
        assert not head.whole
        assert not warnings
        expect_same(model, head, tolerance)


def test_a_soft_cap_is_applied_and_matters() -> None:
    model = make_model("gemma2", PADDED)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    head = connect_head(model, VOCABULARY)
    assert head.softcap == model.config.final_logit_softcapping == 30.0
    expect_same(model, head, 1e-5)
    _, theirs = both(model, head)
    assert 20 < float(theirs.abs().max()) < 30


@pytest.mark.parametrize(
    ("name", "value", "factor"), [("logit_scale", 0.25, 0.25), ("logits_scaling", 8.0, 0.125)]
)
def test_a_scale_of_the_configuration_is_applied(
    name: str, value: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", PADDED)
    setattr(model.config, name, value)
    scale_logits(model, factor, monkeypatch)
    head = connect_head(model, VOCABULARY)
    assert not head.whole
    assert head.scale == factor
    expect_same(model, head, 1e-5)


def scale_logits(model: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model scale its logits after the head."""
    forward = model.forward

    def scaled(*args: Any, **inputs: Any) -> Any:
        output = forward(*args, **inputs)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(model, "forward", scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_does_something_unknown_is_computed_whole_and_reported(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", PADDED).to(dtype)
    scale_logits(model, 1.3, monkeypatch)
    reports: list[Report] = []
    head = connect_head(model, VOCABULARY, reports.append)
    assert head.whole
    assert head.weight is None
    assert head.bias is None
    assert len(reports) == 1
    assert reports[0].warning
    assert reports[0].note.startswith("llama: its head does something unknown after the last layer")
    expect_same(model, head, 1e-6)


def test_a_scale_of_the_configuration_that_the_model_does_not_apply_is_ignored() -> None:
    model = make_model("llama", PADDED)
    model.config.logit_scale = 0.5
    head = connect_head(model, VOCABULARY)
    assert head.whole
    expect_same(model, head, 1e-6)


def test_a_bias_is_added() -> None:
    model = make_model("llama", PADDED)
    model.lm_head = nn.Linear(32, PADDED, bias=True)
    nn.init.normal_(model.lm_head.bias)
    head = connect_head(model, VOCABULARY)
    assert not head.whole
    expect_same(model, head, 1e-5)


def test_connecting_keeps_training_mode() -> None:
    model = make_model("gpt2", PADDED).train()
    assert not connect_head(model, VOCABULARY).whole  # with dropout the logits would differ
    assert model.training


def test_logits_can_be_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2", PADDED)
    head = connect_head(model, VOCABULARY)
    expected, _ = both(model, head)
    monkeypatch.setattr("coldstill.stages.models.output_head.CHUNK_ELEMENTS", 7 * VOCABULARY)
    assert head.chunk == 7
    with torch.no_grad():
        hidden_MD = head.hidden({"input_ids": tokens()}).flatten(0, 1)
        buffer = head.buffer(len(hidden_MD), hidden_MD.device)
        assert buffer.shape == (7, VOCABULARY)
        parts = [head.logits(hidden_MD[i : i + 7], buffer).clone() for i in range(0, 40, 7)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)
