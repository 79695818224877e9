"""Speed and memory of generation by models and exports, and operations per token."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.stages.evaluation import speed as module
from coldstill.stages.evaluation import usage
from coldstill.stages.evaluation.speed import (
    Passage,
    generation_speed,
    generation_speeds,
    passage,
    torch_step,
    weights_bytes,
)
from coldstill.stages.evaluation.usage import flops_per_token, measure_usage
from coldstill.stages.export.checks import resident_memory, writing_speed
from coldstill.stages.export.contract import Runtime
from coldstill.stages.export.reference import TorchRuntime
from coldstill.stages.models.device import PeakMemory
from conftest import FAMILIES, make_model
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.schema import Sequences
    from numpy.typing import NDArray


VOCABULARY = 64


def sequences_of(*lengths: int) -> Sequences:
    random = np.random.default_rng(0)
    rows = [
        [TokenizedDocument(i, random.integers(0, VOCABULARY, n).astype(np.int32), np.ones(n, bool))]
        for i, n in enumerate(lengths)
    ]
    return build_sequences(0, rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_all_batch_sizes_are_measured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)
    model = make_model(family, VOCABULARY)
    speeds = generation_speeds(model, sequences_of(40, 30, 40), 128)
    assert [speed.batch for speed in speeds] == [1, 8]
    for speed in speeds:
        assert speed.prompt_tokens == 40
        assert speed.new_tokens == 32
        assert 0 < speed.token_seconds <= speed.token_seconds_p95
        assert speed.prefill_tokens_per_second == pytest.approx(
            speed.batch * 40 / speed.first_token_seconds, rel=1e-2
        )
        assert speed.decode_tokens_per_second == pytest.approx(
            speed.batch / speed.token_seconds, rel=1e-2
        )
        assert speed.memory_bytes is not None
        assert speed.memory_bytes >= weights_bytes(model)


def test_generation_uses_the_cache_and_only_the_last_logits() -> None:
    model = make_model("llama", VOCABULARY)
    text = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
    seen: list[torch.Tensor] = []
    own = model.forward

    def watched(**inputs: Any) -> Any:
        output = own(**inputs)
        seen.append(output.logits)
        return output

    model.forward = watched
    watched.__signature__ = module.inspect.signature(own)  # type: ignore[attr-defined]
    with torch.no_grad():
        seconds = module._written(torch_step(model), Passage(text_BT=text, prompt=7))
        whole = own(input_ids=torch.from_numpy(text), use_cache=False).logits
    assert seconds is not None
    assert len(seconds) == len(seen) == 5
    assert [logits.shape[1] for logits in seen] == [1] * 5  # logits_to_keep
    torch.testing.assert_close(torch.cat(seen, 1), whole[:, 6:11], rtol=0, atol=1e-4)


def test_prompts_fit_the_context_and_short_sequences_are_repeated() -> None:
    long = sequences_of(400)
    for longest, prompt, new in ((1000, 128, 32), (128, 96, 32), (20, 10, 10), (3, 1, 2)):
        read = passage(long, 1, longest)
        assert read is not None
        assert (read.prompt, read.text_BT.shape) == (prompt, (1, prompt + new))
        assert np.array_equal(read.text_BT[0], long.tokens[0][: prompt + new])
    # rows of a batch come from sequences that are long enough
    sequences = sequences_of(30, 5, 31)
    read = passage(sequences, 3, 60)
    assert read is not None
    assert read.prompt == 30
    for row, number in zip(read.text_BT, (0, 2, 0), strict=True):
        tokens = sequences.tokens[number]
        assert np.array_equal(row, np.concatenate([tokens, tokens])[:60])


def test_figures_are_medians_of_the_runs_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 3)
    runs = [[9.0] * 5, [0.5, 0.01, 0.01, 0.01, 0.3], [0.7] + [0.02] * 4, [0.6] + [0.03] * 4]
    costs = itertools.chain.from_iterable(runs)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    asked: list[tuple[int, ...]] = []

    def step(tokens_BT: np.ndarray[Any, Any], cache: Any) -> Any:
        asked.append(tokens_BT.shape)
        clock[0] += next(costs)
        return True

    inside: list[int] = []

    @contextlib.contextmanager
    def peak() -> Iterator[PeakMemory]:
        found = PeakMemory()
        inside.append(len(asked))
        yield found
        inside.append(len(asked))
        found.bytes = 70

    text = np.zeros((4, 15), np.int64)
    speed = generation_speed(step, Passage(text_BT=text, prompt=10), peak, 1000)
    assert speed is not None
    assert asked == [(4, 10), *[(4, 1)] * 4] * 4
    assert inside == [5, 20]  # memory is measured in the timed runs
    assert speed.first_token_seconds == pytest.approx(0.6)
    assert speed.prefill_tokens_per_second == pytest.approx(66.7)
    further = np.array([run[1:] for run in runs[1:]])
    assert speed.token_seconds == pytest.approx(np.median(further))
    assert speed.token_seconds_p95 == pytest.approx(np.percentile(further, 95), rel=1e-6)
    assert speed.token_seconds_p95 > 4 * speed.token_seconds
    assert speed.decode_tokens_per_second == pytest.approx(4 / 0.02)
    assert speed.memory_bytes == 1070


def test_a_model_without_a_cache_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCABULARY)
    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: own(input_ids=inputs["input_ids"], use_cache=False)
    )
    assert generation_speeds(model, sequences_of(40), 128) == []


def test_tied_weights_count_once() -> None:
    model = make_model("gpt2", VOCABULARY)  # with a tied head
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.state_dict().values()) > parameters
    buffers = sum(b.nbytes for b in model.buffers())
    assert weights_bytes(model) == 4 * parameters + buffers


@pytest.mark.slow
def test_memory_includes_what_a_forward_pass_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)
    model = make_model("llama", VOCABULARY)
    small = generation_speeds(model, sequences_of(40), 128)[0].memory_bytes
    own = model.forward

    def greedy(**inputs: Any) -> Any:
        taken = torch.ones(16_000_000)
        return own(**inputs) if taken.sum() else None

    greedy.__signature__ = module.inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", greedy)
    large = generation_speeds(model, sequences_of(40), 128)[0].memory_bytes
    assert small is not None
    assert large is not None
    # pages that were freed and are counted again add some
    assert large - small == pytest.approx(64e6, rel=0.4)


def test_operations_are_those_of_the_matrix_products() -> None:
    width, wide, layers, length = 32, 96, 3, 20
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    projections = width * (width + width // 2 + width // 2 + width) + 3 * width * wide
    attention = 2 * length * width
    expected = 2 * (layers * (projections + attention) + width * VOCABULARY)
    # the rotary frequencies are a small product too
    assert flops_per_token(model, length) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_long_sequences_follow_from_short_ones(family: str) -> None:
    model = make_model(family, VOCABULARY)
    with torch.no_grad():
        for length in (49, 127):
            assert flops_per_token(model, length) == usage._counted(model, length) // length


@pytest.mark.slow
def test_a_failed_measurement_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from coldstill.stages.evaluation import usage

    def failing(*_: Any) -> int:
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(module, "_REPEATS", 1)
    monkeypatch.setattr(usage, "flops_per_token", failing)
    notes: list[str] = []
    found = measure_usage(make_model("llama", VOCABULARY), sequences_of(40), 128, notes.append)
    assert found.flops_per_token is None
    assert [speed.batch for speed in found.generation] == [1, 8]
    assert notes == ["arithmetic could not be measured: no room"]


@pytest.mark.slow
def test_a_time_limit_leaves_one_short_run_of_the_smallest_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_REPEATS", 5)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    asked: list[int] = []
    model = make_model("llama", VOCABULARY)

    def slow(model: Any) -> Any:
        def step(tokens_BT: np.ndarray[Any, Any], cache: Any) -> Any:
            asked.append(tokens_BT.size)
            clock[0] += 7.0
            return True

        return step

    monkeypatch.setattr(module, "torch_step", slow)
    done: list[int] = []
    (speed,) = generation_speeds(model, sequences_of(40), 128, 10.0, done.append)
    assert asked == [40, 1, 1, 40, 1, 1]
    assert (speed.batch, speed.new_tokens, speed.token_seconds) == (1, 3, 7.0)
    assert done == [0, 1]
    asked.clear()
    assert len(generation_speeds(model, sequences_of(40), 128)) == 2
    assert sum(asked) == 6 * (1 + 8) * (40 + 31)


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


@pytest.mark.slow
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
