"""The script for a GPU runs here at a small size: every line of it but those for CUDA alone."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH = str(Path(__file__).parents[1] / "bench")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(BENCH):
            del sys.modules[name]


class Fused(torch.nn.Module):
    """The interface of Liger's head, in plain PyTorch."""

    def forward(self, weight: Any, states: Any, labels: Any) -> Any:
        return functional.cross_entropy(states @ weight.T, labels)


def fused(states: Any, weight: Any, labels: Any) -> Any:
    """The interface of cut-cross-entropy's head, in plain PyTorch."""
    return functional.cross_entropy(states @ weight.T, labels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # compiling
def test_every_check_passes_at_a_small_size(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, part, head in (
        ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", Fused),
        ("cut_cross_entropy", "linear_cross_entropy", fused),
    ):
        module = ModuleType(name)
        setattr(module, part, head)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    # without the C++ compiler, which takes most of a minute: a GPU has another, and test_blocks.py
    # and test_processes.py compile a training and a capture for CPUs
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rows = gpu.run(gpu.TINY, 1e6)
    assert [row for row in rows if row.passed is False] == []
    assert {row.check for row in rows if row.passed} == {"record", "memory", "resume", "training"}
    names = " ".join(row.what for row in rows if row.check == "step")
    for library in ("transformers", "PyTorch's chunked", "Liger", "cut-cross-entropy"):
        assert f"against {library} CE step, V = 500, memory" in names
    assert sum(row.check == "stage one" and row.value > 0 for row in rows) == 9


def test_a_check_that_fails_is_a_row_and_the_others_run(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sizes: Any, folder: Path) -> Any:
        yield gpu.Row(check="broken", what="before", value=1.0)
        raise ValueError("no such kernel")

    def too_large(sizes: Any, folder: Path) -> Any:
        yield gpu._proof("large", "error", 2.0, 1.0, "nats")

    monkeypatch.setattr(gpu, "CHECKS", {"broken": broken, "large": too_large})
    result = CliRunner().invoke(gpu.main, ["--tiny"])
    assert result.exit_code == 1
    assert "| broken | before | 1 |  |  |" in result.output
    assert "| broken | ValueError: no such kernel |  |  | **failed** |" in result.output
    assert "| large | error | 2 nats | <= 1 nats | **failed** |" in result.output
    assert Path("runs/bench/gpu.json").exists()
    result = CliRunner().invoke(gpu.main, ["--tiny", "--minutes", "-1"])
    assert result.exit_code == 1
    assert "| large | not run: no time is left |" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_small_sizes_are_named(gpu: Any) -> None:
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 1
    assert "--tiny runs the checks at small sizes" in result.output
