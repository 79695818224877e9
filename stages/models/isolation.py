"""Keeping documents that share a sequence from seeing one another, without special kernels.

Position ids that restart at each document, and no attention mask, make transformers isolate packed
documents by itself, but only with `use_cache=False`: with the cache on, the same call leaks
silently. Some models heed only an explicit 4-d mask, recurrent ones neither. So nothing is assumed:
`choose_isolation` tries the model at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ...data.errors import ColdstillError
from ...data.ragged import Ragged
from ...data.schema import Sequences

if TYPE_CHECKING:
    from ...data.reader import StoreReader

Isolation = Literal["positions", "mask", "single"]


def model_inputs(sequences: Sequences, isolation: Isolation, dtype: torch.dtype) -> dict[str, Any]:
    """What the model is called with: `[B, T]` tensors, padded on the right with token 0.

    Padding is a document of its own, so nothing real can see it. `dtype` is the model's, for the
    additive mask.
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
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
    }
    if isolation == "mask":
        inputs["attention_mask"] = _additive_mask(torch.from_numpy(document), dtype)
    return inputs


def flat_positions(sequences: Sequences, length: int) -> torch.Tensor:
    """[M] where the supervised positions lie in a flattened `[B * length]` batch."""
    row_M = np.repeat(np.arange(len(sequences)), sequences.positions.lengths)
    return torch.from_numpy(row_M * length + sequences.positions.values.astype(np.int64))


def choose_isolation(model: Any, vocabulary: int, sequence_length: int) -> Isolation:
    """The first way in which this very model keeps two packed documents apart.

    A way counts if changing the first document leaves the second's hidden states as they were, and
    if both are what they are when each stands alone.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    ways: list[Isolation] = ["positions"]
    if window is None or window >= sequence_length:
        ways.append("mask")  # an explicit mask would replace the model's own sliding window
    for way in ways:
        try:
            if _isolates(model, way, vocabulary):
                return way
        except Exception:
            continue  # a model that does not take these arguments does not isolate with them
    return "single"


def student_isolation(model: Any, store: StoreReader, where: str) -> Isolation:
    """How this student keeps the store's documents apart, as the teacher did.

    Raises
        ColdstillError: it cannot, and the store holds packed documents
    """
    packing = store.manifest.packing
    if not packing.together:
        return "single"
    isolation = choose_isolation(model, store.manifest.tokenizer.size, packing.sequence_length)
    if isolation == "single":
        raise ColdstillError(
            f"{where}: a {model.config.model_type!r} model cannot keep packed documents apart, as "
            "the teacher did; capture again with corpus.pack = false"
        )
    return isolation


def _isolates(model: Any, way: Isolation, vocabulary: int) -> bool:
    random = np.random.Generator(np.random.PCG64(0))
    first, other = (random.integers(0, vocabulary, 9) for _ in range(2))
    second = random.integers(0, vocabulary, 7)
    packed = _hidden(model, [first, second], way)
    changed = _hidden(model, [other, second], way)
    alone = torch.cat([_hidden(model, [d], way) for d in (first, second)])
    scale = float(alone.abs().max())
    # a leak through attention is never below this, rounding never above it
    leak_free = float((packed[9:] - changed[9:]).abs().max()) <= 1e-6 * scale
    tolerance = 1e-4 if packed.dtype == torch.float32 else 5e-2
    return leak_free and float((packed - alone).abs().max()) <= tolerance * scale


@torch.no_grad()
def _hidden(model: Any, documents: list[Any], way: Isolation) -> torch.Tensor:
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    empty = Ragged.from_rows([[]], np.int32)
    sequences = Sequences(
        ids=np.zeros(1, np.int64),
        tokens=Ragged.from_rows([np.concatenate(documents)], np.int32),
        document_starts=Ragged.from_rows([starts], np.int32),
        document_ids=empty,
        positions=empty,
        hashes=np.zeros(1, np.uint64),
    )
    inputs = model_inputs(sequences, way, model.dtype)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    hidden: torch.Tensor = output.hidden_states[-1][0]
    return hidden


def _additive_mask(document_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    length = document_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    blocked = ~(same & causal)
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
