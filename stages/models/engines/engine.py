"""What stage one asks of an engine: hidden states of documents, and answers to prompts.

An engine runs one document at a time as far as the result is concerned, so that documents need no
isolation. The output head is not its business: stage one applies it to the states, and the record
is as exact as one of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from ....data.schema import Sequences
    from ...config import GenerateConfig


class Answers(Protocol):
    """A program that answers prompts. Any thread may call its methods."""

    def answers(
        self, prompts: Sequence[list[int]], room: Sequence[int], asked: Asked
    ) -> list[list[int]]:
        """The answer of each prompt, at least one and at most `room` tokens.

        Raises
            ColdstillError: the engine fails
        """

    def close(self) -> None:
        """End the engine, and free its memory."""


class Engine(Answers, Protocol):
    """A running engine with a loaded teacher."""

    version: str
    """Name and version of the program, for reports."""

    def submit(self, documents: Sequence[list[int]]) -> Future[list[torch.Tensor]]:
        """Queue documents; the result is `[T, D]` for each: the state after the final norm of every
        token. It raises ColdstillError if the engine fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How prompts are answered."""

    config: GenerateConfig
    seeds: tuple[int, ...]
    """One for each prompt."""
    ends: frozenset[int]
    """Tokens that end an answer, which includes the first of them."""
    stop: Callable[[], bool]
    """Once it returns True, answers may stay incomplete. An engine may also complete them."""


def states_of(engine: Engine, sequences: Sequences) -> Callable[[], torch.Tensor]:
    """Queue the documents of some sequences. The result waits for the engine and gives the states
    `[M, D]` at the supervised positions, in order."""
    documents, places = wanted_documents(sequences)
    waiting = engine.submit(documents)

    def wait() -> torch.Tensor:
        states = waiting.result()
        if not states:
            return torch.zeros(0, 0)
        return torch.cat([state[place] for state, place in zip(states, places, strict=True)])

    return wait


def wanted_documents(
    sequences: Sequences, beyond: int = 0
) -> tuple[list[list[int]], list[NDArray[np.int64]]]:
    """The documents of some sequences, and in each the supervised positions, `[M]`.

    Documents without such a position are left out. The others end `beyond` tokens after their last
    one.
    """
    documents: list[list[int]] = []
    places: list[NDArray[np.int64]] = []
    for row in range(len(sequences)):
        tokens_T, starts_D = sequences.tokens[row], sequences.document_starts[row]
        positions = sequences.positions[row].astype(np.int64)
        numbers = np.searchsorted(starts_D, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            start = int(starts_D[number])
            own = positions[numbers == number] - start
            documents.append(tokens_T[start : start + int(own[-1]) + 1 + beyond].tolist())
            places.append(own)
    return documents, places
