"""Speed and memory of exports are measured as those of students."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.stages.evaluation import speed as module
from coldstill.stages.evaluation.speed import Passage, weights_bytes
from coldstill.stages.export.checks import resident_memory, writing_speed
from coldstill.stages.export.contract import Runtime
from coldstill.stages.export.reference import TorchRuntime
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ = Passage(text_BT=np.random.default_rng(0).integers(0, VOCABULARY, (1, 40)), prompt=30)
"""30 tokens are read and 10 generated."""


class Heavy(Runtime):
    """A runtime that holds 50 MB, and takes 20 MB more for each step."""

    title = "heavy"

    def __init__(self) -> None:
        self.weights = np.ones(50_000_000, np.uint8)
        self.calls: list[tuple[int, bool]] = []

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        self.calls.append((len(tokens_T), last))
        taken = np.ones(20_000_000, np.uint8)
        return np.full((1, 5), float(taken[-1])), True


def test_memory_includes_weights_and_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)
    before = resident_memory()
    runtime = Heavy()
    speed = writing_speed(runtime, READ, before)
    assert speed is not None
    assert speed.memory_bytes == pytest.approx(70e6, rel=0.1)
    # a prompt and 9 single tokens in each run, always with the last position alone
    assert runtime.calls == [(30, True), *[(1, True)] * 9] * 3
    assert (speed.batch, speed.prompt_tokens, speed.new_tokens) == (1, 30, 10)

    # the weights of a torch model are counted instead
    model = make_model("llama", VOCABULARY)
    speed = writing_speed(TorchRuntime(model, "torch"), READ, resident_memory() + 10**9)
    assert speed is not None
    assert speed.memory_bytes is not None
    assert weights_bytes(model) <= speed.memory_bytes < weights_bytes(model) + 2**25
    assert 0 < speed.token_seconds <= speed.token_seconds_p95
