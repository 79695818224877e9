"""Model inputs that keep the documents of a sequence or a batch from influencing each other.

The record of a document must be what the teacher computes for that document alone. Position ids
that restart at each document, without an attention mask, make transformers isolate packed documents
by itself, but only with `use_cache=False`: with the cache on, the same call leaks silently. Some
models follow only an explicit 4-d mask, recurrent models follow neither, and in a few models a long
document changes all documents of its batch. So `isolation_choice.py` tests each model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from ...data.schema import Sequences

Isolation = Literal["positions", "mask", "single", "alone"]
"""How documents are kept apart.

`positions` and `mask` isolate documents that share a sequence. `single` means one document per
sequence, `alone` one document per forward pass.
"""


def packs(isolation: Isolation) -> bool:
    """Whether several documents may share a sequence."""
    return isolation in ("positions", "mask")


def recorded(isolation: Isolation) -> Literal["positions", "mask", "single"]:
    """The isolation that a manifest stores: how batches were formed is not part of the record."""
    return "single" if isolation == "alone" else isolation


def model_inputs(sequences: Sequences, isolation: Isolation, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the model: `[B, T]` tensors, padded on the right with token 0.

    Padding is a document by itself, so no real document sees it. `dtype` is the model's, for the
    additive mask. With `alone` the result holds `lengths` `[B]`, which `OutputHead.hidden` reads.
    """
    rows, length = len(sequences), int(sequences.tokens.lengths.max())
    input_ids = np.zeros((rows, length), dtype=np.int64)
    position_ids = np.zeros((rows, length), dtype=np.int64)
    document = np.zeros((rows, length), dtype=np.int64)
    for row in range(rows):
        tokens_T, starts_D = sequences.tokens[row], sequences.document_starts[row]
        starts = np.append(starts_D, len(tokens_T)) if len(tokens_T) < length else starts_D
        input_ids[row, : len(tokens_T)] = tokens_T
        begins = np.zeros(length, dtype=np.int64)
        begins[starts[1:]] = 1
        document[row] = np.cumsum(begins)
        position_ids[row] = np.arange(length) - starts[document[row]]
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids)}
    if isolation == "alone":
        inputs["lengths"] = torch.from_numpy(sequences.tokens.lengths.astype(np.int64))
        return inputs
    inputs["position_ids"] = torch.from_numpy(position_ids)
    if isolation == "mask":
        inputs["attention_mask"] = _additive_mask(torch.from_numpy(document), dtype)
    return inputs


def flat_positions(sequences: Sequences, length: int) -> torch.Tensor:
    """[M] indices of the supervised positions in a flattened `[B * length]` batch."""
    row_M = np.repeat(np.arange(len(sequences)), sequences.positions.lengths)
    return torch.from_numpy(row_M * length + sequences.positions.values.astype(np.int64))


def _additive_mask(document_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    length = document_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    blocked = ~(same & causal)
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
