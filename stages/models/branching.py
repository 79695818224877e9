"""Model inputs in which words leave the text, and the test that a model reads them so.

A branch (`data/branches.py`) is read behind the sequence. It has the positions that it would have
in the text, and an attention mask lets it see the text up to the place where it leaves, and itself.
The text does not see it. So a model with attention gives its tokens the states of a text that goes
on with the branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.branches import Branches
from ...data.errors import ColdstillError, first_line
from ...data.prepared import TokenizedDocument, build_sequences
from ...data.ragged import Ragged, places_in
from .device import enough_memory
from .inputs import NO_WINDOWS, Columns, attention_masks, attention_windows, inputs_on
from .isolation import follows_masks, length_thresholds
from .loading import context_length
from .model_files import without_branches
from .rounding import agree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ...data.schema import Sequences
    from .output_head import OutputHead


@dataclass(frozen=True, slots=True, eq=False)
class BranchInputs:
    """Sequences with their branches as a model reads them."""

    inputs: dict[str, Any]
    """`input_ids` and `position_ids` `[B, T + X]`, `attention_mask` `[B, 1, T + X, T + X]`, or one
    for each kind of layer, by its name. The text is in the first T columns, as in
    `model_inputs`."""
    row_X: NDArray[np.int64]
    """[X of all sequences] sequence of each token of a branch, except the last of each branch."""
    column_X: NDArray[np.int64]
    """[X] its column."""
    labels_X: NDArray[np.int32]
    """[X] the token that follows it in the branch."""
    weights_X: NDArray[np.float32]
    """[X] the weight of its branch."""
    columns: int
    """Columns behind the text."""

    def flat_positions(self) -> torch.Tensor:
        """[X] indices of these tokens in the flattened `[B * (T + X)]` batch."""
        width = self.inputs["input_ids"].shape[1]
        return torch.from_numpy(self.row_X * width + self.column_X)


def branch_inputs(
    sequences: Sequences,
    branches: Branches,
    dtype: torch.dtype,
    windows: Mapping[str, int | None] = NO_WINDOWS,
) -> BranchInputs:
    """Keyword arguments of a model that reads sequences and their branches.

    dtype    the model's, for the additive masks
    windows  those of the model (`attention_windows`)
    """
    text = Columns.of(sequences)
    rows, length = text.ids.shape
    sizes_B = branches.sizes.values.astype(np.int64)
    row_B = np.repeat(np.arange(rows), branches.places.lengths)
    branch_X, within_X = places_in(sizes_B - 1)  # nothing follows the last token
    token_X = (np.cumsum(sizes_B) - sizes_B)[branch_X] + within_X
    row_X, place_X = row_B[branch_X], branches.places.values[branch_X]
    counts = np.bincount(row_X, minlength=rows)
    column_X = length + places_in(counts)[1]
    width = length + int(counts.max(initial=0))
    ids = torch.zeros(rows, width, dtype=torch.int64)
    positions = torch.zeros(rows, width, dtype=torch.int64)
    ids[:, :length], positions[:, :length] = text.ids, text.positions
    ids[row_X, column_X] = torch.from_numpy(branches.tokens.values[token_X].astype(np.int64))
    within = torch.from_numpy(within_X)
    positions[row_X, column_X] = text.positions[row_X, place_X] + 1 + within
    seen = torch.zeros(rows, width, width, dtype=torch.bool)
    seen[:, :length, :length] = text.seen()
    seen[row_X, column_X, :length] = seen[row_X, place_X, :length]
    for back in range(int(within_X.max(initial=-1)) + 1):
        own = within_X >= back
        seen[row_X[own], column_X[own], column_X[own] - back] = True
    padding = torch.arange(width)
    seen[:, padding, padding] = True  # a row that sees nothing would become NaN
    return BranchInputs(
        inputs={
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": attention_masks(seen, positions, dtype, windows),
        },
        row_X=row_X,
        column_X=column_X,
        labels_X=branches.tokens.values[token_X + 1].astype(np.int32),
        weights_X=branches.weights.values[branch_X].astype(np.float32),
        columns=width - length,
    )


_FIRST, _SECOND, _SIZE = 9, 7, 3
"""Tokens of two short documents, and of a branch."""
_BEYOND = 8
"""Tokens by which a long document, or the columns, exceed a length at which the model changes."""
_WIDE = 2
"""Sequence lengths up to which the columns of a batch are tested; most batches have fewer."""


def expect_branching(head: OutputHead, sequence_length: int, where: str) -> None:
    """Compare the states of branches with those of texts that go on with them.

    Branches have other shapes than texts, so a small leak between them could pass for rounding. It
    is found between documents: a model that masks do not keep apart is refused, too.

    Raises
        ColdstillError: they differ, so the model cannot learn from branches; or memory ran out
    """
    model, why = head.model, ""
    try:
        with enough_memory(model, where):
            if _same_states(head, sequence_length) and follows_masks(
                model, head.vocabulary, sequence_length, where
            ):
                return
    except ColdstillError:
        raise
    except Exception as error:  # unsupported models raise any class
        why = f" ({first_line(error)})"
    raise without_branches(model.config.model_type, where, why)


def _same_states(head: OutputHead, sequence_length: int) -> bool:
    random = np.random.Generator(np.random.PCG64(0))
    sizes = [min(size, max(2, sequence_length)) for size in (_FIRST, _SECOND)]
    sizes += [t + _BEYOND for t in length_thresholds(head.model.config, sequence_length)]
    documents = [random.integers(0, head.vocabulary, size).astype(np.int32) for size in sizes]
    pieces = [TokenizedDocument(0, tokens, tokens >= 0) for tokens in documents]
    packed = [pieces[:2], *([piece] for piece in pieces[2:])]
    sequences = build_sequences(0, packed)
    # some models count columns, and not positions, in windows and tables: the first two branches
    # are behind so many others that they are beyond each such length
    config, wide = head.model.config, _WIDE * sequence_length
    columns = [*length_thresholds(config, wide), context_length(config) or 0]
    columns = [each + _BEYOND for each in columns if sequence_length <= each < wide]
    others = max([0, *columns]) // (_SIZE - 1)
    # two branches in each sequence: of the first, one for each of its documents; of a long
    # document, one that leaves before the model changes, and one at the end
    places = [
        [*([0] * others), sizes[0] // 2, sizes[0] + 1],
        *([1, size - 1] for size in sizes[2:]),
    ]
    count = sum(map(len, places))
    words = random.integers(0, head.vocabulary, (count, _SIZE)).astype(np.int32)
    branches = Branches(
        places=Ragged.from_rows(places, np.int32),
        sizes=Ragged.from_rows([[_SIZE] * len(each) for each in places], np.int32),
        tokens=Ragged(words.ravel(), _SIZE * Ragged.from_rows(places, np.int32).offsets),
        weights=Ragged.from_rows([[1.0] * len(each) for each in places], np.float32),
    )
    found = branch_inputs(sequences, branches, head.model.dtype, attention_windows(config))
    states = _states(head, found.inputs)[found.row_X, found.column_X]
    owners = [*documents[:2], *(each for each in documents[2:] for _ in range(2))]
    kept = [place + 1 for row in places for place in row][others:]
    kept[1] -= sizes[0]
    for number, (document, end) in enumerate(zip(owners, kept, strict=True), start=others):
        alone = np.append(document[:end], words[number]).astype(np.int64)
        own = states[number * (_SIZE - 1) : (number + 1) * (_SIZE - 1)]
        states_of = partial(_states_alone, head, alone, slice(end, end + _SIZE - 1))
        if not agree(own, states_of(), head.model, states_of):
            return False
    return True


def _states_alone(head: OutputHead, tokens_T: NDArray[np.int64], places: slice) -> torch.Tensor:
    """States of a text at some places."""
    return _states(head, {"input_ids": torch.from_numpy(tokens_T)[None]})[0, places]


@torch.no_grad()
def _states(head: OutputHead, inputs: dict[str, Any]) -> torch.Tensor:
    return head.hidden(inputs_on(head.model.device, inputs)).float()
