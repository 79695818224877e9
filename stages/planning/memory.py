"""How much memory each stage will need, told from a model's sizes before anything is loaded.

Rules of thumb: they say "about". Counted are weights, gradients and the optimiser's state; what a
layer keeps was measured with `stages.models.device.peak_memory` (CPU, transformers 5.23, sdpa,
packed documents, fp32 and bf16) and put into formulas of D, F and T. What the rules say of layers,
against what was measured (forward passes and training, 4,096 tokens):

    Llama, 4 and 8 layers, D 256 and 512, F 704 and 2048, T 512 and 2048    -7% to +11%
    GPT-2, 4 layers of 256                                                  -21% to +1%
    Qwen3, likewise, which also normalises queries and keys                 -32% to -14%
    Llama with gradient checkpointing, 4 to 12 layers, D 256 and 512        -23% to +14%

Of whole stages with a Llama that the formulas were not made for (16.8 million parameters, D 384,
V 16,000, 4 x 1,024 tokens): training 1.39 GB against 1.63 measured, a capture 0.38 GB against 0.23,
since a CPU selects from few logits at a time and makes no second chunk, of 0.1 GB. Not measured on
a GPU: its allocator keeps more than is used, and a chunk there may be a 128th of its memory, if
that is more. Attention other than sdpa keeps `heads * T` numbers a token. Python, torch and the
libraries take about half a gigabyte besides.
"""

from __future__ import annotations

from .model_sizes import WIDTHS, ModelSizes

CHUNK_ELEMENTS = 3 << 23
"""`stages.models.output_head.CHUNK_ELEMENTS`, which cannot be asked without loading torch."""
_STATE_BYTES = 16
"""Of a trained parameter: itself, its gradient and AdamW's two means, all fp32."""
_SLOW_ACTIVATIONS = {"gelu_new", "gelu_fast"}
"""Written out in Python by transformers: each step keeps a tensor of width F."""


def capture_memory(
    sizes: ModelSizes, precision: str, batch_tokens: int, sequence_length: int
) -> int:
    """Bytes that running the teacher takes.

    precision     `teacher.dtype`: `auto` is what the checkpoint is kept in
    batch_tokens  of a forward pass

    Weights; one layer's numbers, `7 D + 3 F` a token, and a mask of T; the logits of a chunk, and
    as many again while head and tail are selected.
    """
    width = WIDTHS.get(sizes.dtype if precision == "auto" else precision, 4)
    tokens = _whole_sequences(batch_tokens, sequence_length)
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
    again: bool = False,
) -> int:
    """Bytes that training a model takes.

    precision     `train.precision`; weights, gradients and optimiser stay fp32
    batch_tokens  of a forward pass (`train.micro_batch_tokens`)
    frozen        only adapters are learned, beside weights in their own precision
    adapters      how many numbers those have, if it is known
    again         `train.gradient_checkpointing`: a layer keeps `5 D` numbers a token, and 1.75
                  times one layer's are there while it is computed again

    16 bytes a parameter; what every layer keeps for the backward pass, `10 D + 4 F + T` numbers a
    token, or `14 D + 2 F + T` where matrix products are in half precision; the logits of a chunk
    and their gradient.
    """
    tokens = _whole_sequences(batch_tokens, sequence_length)
    half = precision != "fp32"
    wide = 13 if sizes.activation in _SLOW_ACTIVATIONS else 4
    per_layer = (14 if half else 10) * sizes.hidden + sequence_length
    per_layer += (wide // 2 if half else wide) * sizes.feed_forward
    beside = 4 * sizes.hidden + sequence_length
    kept = sizes.layers * per_layer
    if again:
        kept = min(kept, sizes.layers * 5 * sizes.hidden + 7 * per_layer // 4)
    activations = 4 * tokens * (kept + beside)
    copies = 2 * sizes.parameters if half else 0
    state = WIDTHS.get(sizes.dtype, 4) if frozen else _STATE_BYTES
    held = sizes.parameters * state + (0 if frozen else copies) + adapters * _STATE_BYTES
    return held + activations + 2 * _chunk_bytes(sizes, tokens)


def _whole_sequences(batch_tokens: int, sequence_length: int) -> int:
    """Tokens of a batch: whole sequences, and at least one."""
    return max(1, batch_tokens // sequence_length) * sequence_length


def _chunk_bytes(sizes: ModelSizes, tokens: int) -> int:
    """fp32 logits that are computed at a time."""
    return 4 * min(max(CHUNK_ELEMENTS, sizes.vocabulary), tokens * sizes.vocabulary)
