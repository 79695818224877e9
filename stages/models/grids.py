"""Grids of few bits: the values that a quantised format can hold, as its runtime chooses them.

A grid is levels (small integers) times a scale, one scale for each block of a matrix's row. The
scale of a block follows from its own weights, so that rounding needs no data. Every grid here is
its own fixed point: rounding a rounded matrix changes nothing (`row` up to the last digit of fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...data.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

RECORD = "quantization.json"
"""Name of the record beside weights that were trained on a grid."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One way to choose levels and scales of a matrix `[..., K]`."""

    name: str
    bits: int
    block: int | None
    """Consecutive inputs that share a scale; None for a whole row."""

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., B, S] levels as fp32 integers, and [..., B, 1] fp32 scales of B blocks of S inputs.

        `q4_0`, of ggml: levels -8 to 7, the scale is the weight of largest magnitude, with its
        sign, over -8, stored in fp16. `q8_0`, of ggml: levels -127 to 127, the scale is the largest
        magnitude over 127, stored in fp16. `row` is the same as `q8_0` with one scale in fp32. ggml
        rounds 8-bit ties away from zero, and to even is rounded here; rounded weights have no ties.
        """
        blocks = weight.float().reshape(*weight.shape[:-1], -1, self.block or weight.shape[-1])
        if self.bits == 4:
            place = blocks.abs().argmax(-1, keepdim=True)
            scale = blocks.gather(-1, place) / -8
            # of numbers from 0.5 on, floor is what truncation is, and much faster on CPUs
            steps = (blocks * _inverse(scale)).add_(8.5).floor_().clamp_(0, 15).sub_(8)
        else:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            steps = (blocks * _inverse(scale)).round_()
        return steps, scale if self.block is None else scale.half().float()

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix on its grid, in its own dtype."""
        levels, scale = self.levels(weight)
        return levels.mul_(scale).flatten(-2).to(weight.dtype)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for blocks of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """The grid of each part of a model, and the exports that have the same grids."""

    layers: Grid
    head: Grid
    """Grid of the output head, and of the embedding if both are one matrix."""
    tied_head: bool = True
    """Whether a head that is also the embedding is rounded."""
    activations: Grid | None = None
    """Grid of the inputs of rounded layers; None leaves them exact."""
    formats: tuple[str, ...]
    """Exports that hold the rounded weights without further loss."""


Q4, Q8, ROW = Grid("q4_0", 4, 32), Grid("q8_0", 8, 32), Grid("row", 8, None)
_FOUR: dict[str, Any] = {"layers": Q4, "head": Q8, "formats": ("gguf-q4_0",)}
_EIGHT: dict[str, Any] = {"layers": Q8, "head": Q8, "formats": ("gguf-q8_0", "onnx-int8")}
SCHEMES = {
    "int4": Scheme(**_FOUR),
    "int4-dynamic": Scheme(**_FOUR, activations=Q8),
    "int8": Scheme(**_EIGHT),
    "int8-dynamic": Scheme(**_EIGHT, activations=Q8),
    "int8-row": Scheme(layers=ROW, head=ROW, tied_head=False, formats=("torchao-int8",)),
}
"""What `quantize` of a student can name."""


def grid_record(folder: Path) -> dict[str, Any] | None:
    """The record beside a model whose weights were trained on a grid; None for any other model."""
    path = folder / RECORD
    return read_json(path) if path.exists() else None
