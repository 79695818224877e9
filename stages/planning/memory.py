"""Estimated memory of each stage, from a model's sizes. Loads no model and no torch.

Weights, gradients and the optimiser's state are counted. What a layer keeps follows formulas in D
(hidden width), F (feed-forward width) and T (sequence length). They were fitted to
`stages.models.device.peak_memory` (CPU, transformers 5.23, sdpa, packed documents, fp32 and bf16).
Error of the formulas on layers (forward passes and training, 4,096 tokens):

    Llama, 4 and 8 layers, D 256 and 512, F 704 and 2048, T 512 and 2048    -7% to +11%
    GPT-2, 4 layers of 256                                                  -21% to +1%
    Qwen3, same sizes, which also normalises queries and keys               -32% to -14%
    Llama with gradient checkpointing, 4 to 12 layers, D 256 and 512        -23% to +14%

Whole stages of a Llama that was not used for the fit (16.8 million parameters, D 384, V 16,000,
4 x 1,024 tokens): training 1.39 GB estimated, 1.63 GB measured; capture 0.38 GB estimated, 0.23 GB
measured, because a CPU selects from a few logits at a time and needs no second chunk of 0.1 GB.

Not measured on a GPU: its allocator reserves more than is used, and a chunk may take 1/128 of its
memory if that is larger. Attention other than sdpa keeps `heads * T` numbers per token. Python,
torch and the libraries take about half a gigabyte in addition.
"""

from __future__ import annotations

from ..config import sequences_in
from ..models.chunk_size import chunk_rows
from .model_sizes import WIDTHS, ModelSizes

_STATE_BYTES = 16
"""Bytes per trained parameter: weight, gradient and the two AdamW moments, all fp32."""
_SLOW_ACTIVATIONS = {"gelu_new", "gelu_fast"}
"""Activations that transformers computes step by step; each step keeps a tensor of width F."""


def capture_memory(
    sizes: ModelSizes, precision: str, batch_tokens: int, sequence_length: int
) -> int:
    """Bytes for running the teacher.

    precision     `teacher.dtype`; `auto` is the precision of the checkpoint
    batch_tokens  tokens of a forward pass

    The sum of: the weights; one layer's activations, `7 D + 3 F` numbers per token, and a mask of
    T; a chunk of logits, twice, because head and tail are selected from a copy.
    """
    width = WIDTHS.get(sizes.dtype if precision == "auto" else precision, 4)
    tokens = sequences_in(batch_tokens, sequence_length) * sequence_length
    wide = 10 if sizes.activation in _SLOW_ACTIVATIONS else 3
    layer = width * (7 * sizes.hidden + wide * sizes.feed_forward) + 4 * sequence_length
    return sizes.parameters * width + tokens * layer + 2 * _chunk_bytes(sizes, tokens)


def training_memory(
    sizes: ModelSizes,
    precision: str,
    batch_tokens: int,
    sequence_length: int,
    *,
    frozen: bool = False,
    adapters: int = 0,
    checkpointing: bool = False,
    rounded: bool = False,
) -> int:
    """Bytes for training a model.

    precision      `train.precision`; weights, gradients and optimiser state stay fp32
    batch_tokens   tokens of a forward pass (`train.micro_batch_tokens`)
    frozen         train adapters only; the weights keep their own precision
    adapters       number of adapter weights, if known
    checkpointing  `train.gradient_checkpointing`: a layer keeps `5 D` numbers per token, and 1.75
                   times one layer's activations exist while it is recomputed
    rounded        `quantize`: the backward pass needs a rounded copy of the weights, too

    The sum of: 16 bytes per parameter; the activations that every layer keeps for the backward
    pass, `10 D + 4 F + T` numbers per token, or `14 D + 2 F + T` with half-precision matrix
    products; a chunk of logits and its gradient.
    """
    tokens = sequences_in(batch_tokens, sequence_length) * sequence_length
    half = precision != "fp32"
    wide = 13 if sizes.activation in _SLOW_ACTIVATIONS else 4
    per_layer = (14 if half else 10) * sizes.hidden + sequence_length
    per_layer += (wide // 2 if half else wide) * sizes.feed_forward
    outside = 4 * sizes.hidden + sequence_length
    kept = sizes.layers * per_layer
    if checkpointing:
        kept = min(kept, sizes.layers * 5 * sizes.hidden + 7 * per_layer // 4)
    activations = 4 * tokens * (kept + outside)
    if frozen:
        held = sizes.parameters * WIDTHS.get(sizes.dtype, 4)
    else:
        held = sizes.parameters * (_STATE_BYTES + (2 if half else 0) + (4 if rounded else 0))
    return held + adapters * _STATE_BYTES + activations + 2 * _chunk_bytes(sizes, tokens)


def _chunk_bytes(sizes: ModelSizes, tokens: int) -> int:
    """Bytes of a chunk of fp32 logits."""
    return 4 * sizes.vocabulary * min(chunk_rows(sizes.vocabulary), tokens)
