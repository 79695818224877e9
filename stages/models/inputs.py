"""The keyword arguments with which a model reads sequences.

An explicit attention mask replaces the sliding windows of a model, so the mask of a layer with a
window has the window, too. It is measured in positions, which restart at each document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from ...data.schema import Sequences

Isolation = Literal["positions", "mask", "single", "alone", "documents"]
"""How documents are kept apart.

`positions` and `mask` isolate documents that share a sequence. `single` means one document per
sequence, `alone` one document per forward pass. `documents` means that an engine takes each
document by itself.
"""

NO_WINDOWS: Mapping[str, int | None] = {}
_SLIDING = "sliding_attention"


def attention_windows(config: Any) -> Mapping[str, int | None]:
    """How many tokens the layers of a model see, with their own, by kind of layer; None if all.

    The kinds are those of the configuration's `layer_types`. Empty if the model has no window.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not window:
        return NO_WINDOWS
    kinds = dict.fromkeys(getattr(text, "layer_types", None) or (_SLIDING,))
    return {kind: window if kind == _SLIDING else None for kind in kinds}


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """`[B, T]` sequences, padded on the right. Padding is a document by itself."""

    ids: torch.Tensor
    """Token ids; padding is 0."""
    positions: torch.Tensor
    """Positions within each document."""
    documents: torch.Tensor
    """Number of the document within its sequence."""

    @classmethod
    def of(cls, sequences: Sequences) -> Columns:
        rows, length = len(sequences), int(sequences.tokens.lengths.max())
        ids: NDArray[np.int64] = np.zeros((rows, length), dtype=np.int64)
        positions, documents = np.zeros_like(ids), np.zeros_like(ids)
        for row in range(rows):
            tokens_T, starts_D = sequences.tokens[row], sequences.document_starts[row]
            starts = np.append(starts_D, len(tokens_T)) if len(tokens_T) < length else starts_D
            ids[row, : len(tokens_T)] = tokens_T
            begins = np.zeros(length, dtype=np.int64)
            begins[starts[1:]] = 1
            documents[row] = np.cumsum(begins)
            positions[row] = np.arange(length) - starts[documents[row]]
        return cls(*map(torch.from_numpy, (ids, positions, documents)))

    def seen(self) -> torch.Tensor:
        """[B, T, T] whether a token (second axis) sees another (third axis): it is in the same
        document and does not follow."""
        same = self.documents[:, :, None] == self.documents[:, None]
        return same.logical_and_(torch.ones(same.shape[1:], dtype=torch.bool).tril())


def model_inputs(
    sequences: Sequences,
    isolation: Isolation,
    dtype: torch.dtype,
    windows: Mapping[str, int | None] = NO_WINDOWS,
) -> dict[str, Any]:
    """Keyword arguments of the model: `[B, T]` tensors, padded on the right with token 0.

    Padding is a document by itself, so no real document sees it. With `mask` the result holds
    `attention_masks`, with `alone` `lengths` `[B]`, which `OutputHead.hidden` reads.

    dtype    the model's, for additive masks
    windows  those of the model (`attention_windows`), for masks
    """
    columns = Columns.of(sequences)
    inputs: dict[str, Any] = {"input_ids": columns.ids}
    if isolation == "alone":
        return inputs | {"lengths": torch.from_numpy(sequences.tokens.lengths.astype(np.int64))}
    inputs["position_ids"] = columns.positions
    if isolation == "mask":
        masks = attention_masks(columns.seen(), columns.positions, dtype, windows)
        inputs["attention_mask"] = masks
    return inputs


def attention_masks(
    seen_BTT: torch.Tensor,
    positions_BT: torch.Tensor,
    dtype: torch.dtype,
    windows: Mapping[str, int | None] = NO_WINDOWS,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """`[B, 1, T, T]` what is added to attention scores: the least number where nothing is seen.

    One mask for all layers, or one for each kind of layer if a window makes them differ.
    """
    length = seen_BTT.shape[-1]
    shown, hidden = torch.tensor([0.0, torch.finfo(dtype).min], dtype=dtype)
    masks: dict[int | None, torch.Tensor] = {}
    shorter = {kind: w if w and w < length else None for kind, w in windows.items()}
    for window in dict.fromkeys(shorter.values()) or (None,):
        near = seen_BTT
        if window is not None:
            # tokens that are seen are of the same document, so positions give their distance
            near = near & (positions_BT[:, :, None] < positions_BT[:, None] + window)
        masks[window] = torch.where(near, shown, hidden)[:, None]
    if len(masks) == 1:
        return masks.popitem()[1]
    return {kind: masks[window] for kind, window in shorter.items()}


def flat_positions(sequences: Sequences, length: int) -> torch.Tensor:
    """[M] indices of the supervised positions in a flattened `[B * length]` batch."""
    row_M = np.repeat(np.arange(len(sequences)), sequences.positions.lengths)
    return torch.from_numpy(row_M * length + sequences.positions.values.astype(np.int64))


def map_inputs(
    inputs: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Apply a function to every tensor of a model's inputs, also in tables of masks."""
    return {
        name: map_inputs(each, change) if isinstance(each, dict) else change(each)
        for name, each in inputs.items()
    }


def inputs_on(
    device: torch.device, inputs: Mapping[str, Any], *, non_blocking: bool = False
) -> dict[str, Any]:
    """A model's inputs on a device."""
    return map_inputs(inputs, lambda tensor: tensor.to(device, non_blocking=non_blocking))
