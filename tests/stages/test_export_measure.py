"""What an export costs is measured as what a student costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.stages.evaluation import generation_speed as module
from coldstill.stages.evaluation.generation_speed import Passage, weights_bytes
from coldstill.stages.export.measure import resident, writing_speed
from coldstill.stages.export.torch_runtime import TorchRuntime
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ = Passage(
    text_BT=np.random.default_rng(0).integers(0, VOCABULARY, (1, 40)), prompt=30
)  # 10 are written


class Heavy:
    """A runtime of something else than torch, which keeps 50 MB and takes 20 more to write."""

    title, is_own, elsewhere = "heavy", True, None

    def __init__(self) -> None:
        self.weights = np.ones(50_000_000, np.uint8)
        self.asked: list[tuple[int, bool]] = []

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        self.asked.append((len(tokens_T), last))
        taken = np.ones(20_000_000, np.uint8)
        return np.full((1, 5), float(taken[-1])), True

    def close(self) -> None: ...


def test_memory_is_that_of_the_weights_and_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)
    before = resident()
    runtime = Heavy()
    speed = writing_speed(runtime, READ, before)
    assert speed is not None
    assert speed.memory_bytes == pytest.approx(70e6, rel=0.1)
    # a prompt, then a token at a time, of which the last place alone is asked for
    assert runtime.asked == [(30, True), *[(1, True)] * 9] * 3
    assert (speed.batch, speed.prompt_tokens, speed.new_tokens) == (1, 30, 10)


def test_of_a_model_of_torch_the_weights_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)
    model = make_model("llama", VOCABULARY)
    speed = writing_speed(TorchRuntime(model, "torch"), READ, resident() + 10**9)
    assert speed is not None
    assert speed.memory_bytes is not None
    assert weights_bytes(model) <= speed.memory_bytes < weights_bytes(model) + 2**25
    assert 0 < speed.token_seconds <= speed.token_seconds_p95
