"""Options of training that change time and memory: the losses stay what they were."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig, LoraConfig
from coldstill.stages.train_student import train_student
from coldstill.stages.training import execution as blocks
from conftest import VOCABULARY, make_model
from safetensors.torch import load_file
from small_runs import save_teacher
from small_students import student_job
from small_trainings import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader


def learn(
    store: StoreReader,
    folder: Path,
    family: str = "llama",
    lora: LoraConfig | None = None,
    model: Path | None = None,
    **train: Any,
) -> list[float]:
    """The losses of six steps of a new student of two layers."""
    table = ArchitectureConfig(family=family, layers=2, hidden=32, heads=2)
    origin: dict[str, Any] = {"architecture": table} if model is None else {"model": str(model)}
    train_student(student_job(folder, lora=lora, train=train, **origin), store)
    return [line["loss"] for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("base") / "model", tokenizer, seed=7)


@pytest.fixture(scope="module")
def plain(store: StoreReader, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return learn(store, tmp_path_factory.mktemp("plain"))


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model" / "model.safetensors"))


@pytest.mark.slow
def test_bf16_learns_about_the_same_and_keeps_fp32_weights(
    store: StoreReader, plain: list[float], tmp_path: Path
) -> None:
    losses = learn(store, tmp_path, precision="bf16")
    assert losses == pytest.approx(plain, rel=5e-3)
    assert losses != plain
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_no_loss(
    family: str, store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; gpt2 has dropout, which must fall the same way the second time."""
    plain = learn(store, tmp_path / "plain", family)
    computed = count_forwards(monkeypatch, family)
    assert learn(store, tmp_path / "again", family, gradient_checkpointing=True) == plain
    # training computes each block twice; the checks before it do not
    again = len(computed)
    computed.clear()
    learn(store, tmp_path / "third", family)
    assert again == len(computed) + 6 * 2
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("again", "plain"))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def count_forwards(monkeypatch: pytest.MonkeyPatch, family: str) -> list[Any]:
    """One entry for each time a block is computed."""
    found = blocks.named_blocks(make_model(family, VOCABULARY))
    assert found is not None
    kind: Any = type(found[1][0].mlp)  # the block's own forward is what checkpoints
    computed: list[Any] = []
    forward = kind.forward

    def counted(self: Any, *inputs: Any, **named: Any) -> Any:
        computed.append(self)
        return forward(self, *inputs, **named)

    monkeypatch.setattr(kind, "forward", counted)
    return computed


@pytest.mark.slow
def test_checkpointing_works_with_frozen_weights(
    store: StoreReader, base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": base, "lora": LoraConfig(rank=4), "learning_rate": 2e-2}
    plain = learn(store, tmp_path / "plain", **settings)
    again = learn(store, tmp_path / "again", gradient_checkpointing=True, **settings)
    assert again == plain
    assert plain[-1] < plain[0]


# asked by torch's own trace, which the test runner's log switches on
quiet_trace = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything of `torch.compile` but the C++ compiler, which takes seconds a graph; what
    dynamo has counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks._no_compiler.cache_clear()
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    return torch._dynamo.utils.counters


@pytest.mark.slow
@quiet_trace
def test_compiled_blocks_give_the_same_losses_and_an_ordinary_checkpoint(
    store: StoreReader,
    plain: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    traced: Any,
) -> None:
    models: list[Any] = []
    find = blocks.named_blocks

    def watched(model: Any) -> Any:
        models.append(model)
        return find(model)

    monkeypatch.setattr(blocks, "named_blocks", watched)
    assert learn(store, tmp_path, compile=True) == pytest.approx(plain, rel=1e-4)
    # the probe, and one graph for both blocks, made again as shapes turn out to change
    assert 2 <= traced["stats"]["unique_graphs"] <= 4
    assert not traced["graph_break"]
    found = find(models[0])
    assert found is not None
    assert not any("forward" in vars(block) for block in found[1])
    ordinary = set(make_model("llama-tied", VOCABULARY).state_dict()) - {"lm_head.weight"}
    assert names(tmp_path) == ordinary
    checkpoint = tmp_path / "checkpoints" / "checkpoint-6" / "model.safetensors"
    assert set(load_file(checkpoint)) == ordinary


@pytest.mark.slow
@quiet_trace
def test_a_real_compiler_gives_the_same_loss(
    store: StoreReader, plain: list[float], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    assert learn(store, tmp_path, compile=True, steps=1) == pytest.approx(plain[:1], rel=1e-4)


@pytest.mark.slow
@quiet_trace
def test_all_options_work_together(
    store: StoreReader, base: Path, tmp_path: Path, traced: Any
) -> None:
    """Adapters in compiled, checkpointed blocks."""
    settings: dict[str, Any] = {"model": base, "lora": LoraConfig(rank=4), "learning_rate": 2e-2}
    plain = learn(store, tmp_path / "plain", **settings)
    both: dict[str, Any] = {"compile": True, "gradient_checkpointing": True}
    assert learn(store, tmp_path / "all", **both, **settings) == pytest.approx(plain, rel=1e-4)
    assert traced["stats"]["unique_graphs"] > 1
    assert names(tmp_path / "all") == names(tmp_path / "plain")


def test_options_that_cannot_work_are_refused_before_training(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nmore of it")

        return call

    blocks._no_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(
        type(make_model("llama", VOCABULARY)), "supports_gradient_checkpointing", False
    )
    for option, message in {
        "compile": "torch.compile does not work on this machine: InvalidCxxCompiler: no working "
        "C++ compiler found; remove it, or install a C++ compiler (on a GPU, Triton)",
        "gradient_checkpointing": "a 'llama' model does not support it; remove it, or lower "
        "micro_batch_tokens instead",
    }.items():
        options: dict[str, Any] = {option: True}
        with pytest.raises(ColdstillError) as error:
            learn(store, tmp_path / "out", **options)
        assert str(error.value) == f"train-student small: train.{option}: {message}"
    assert not (tmp_path / "out").exists()
    blocks._no_compiler.cache_clear()
