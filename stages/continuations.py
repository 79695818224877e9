"""Continuations of held-out documents by several models, for people to read.

Models sample their tokens, because greedy decoding of a small model soon repeats itself. All models
use the same random numbers, so models with the same distribution write the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.order import uniform
from ..data.prepared import BLOCK_SEQUENCES
from .evaluation.speed import call_settings
from .models.loading import context_length
from .models.rotary import scale_by_document

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..data.prepared import SequenceFile
    from ..data.schema import Sequences
    from ..data.store.reader import StoreReader

PROMPT_TOKENS, NEW_TOKENS = 32, 40
_MOST_PROMPT = 256
"""Longest prompt of a corpus with prompts, in tokens. A longer one takes too long to read."""
_LEAST = 8
"""Fewest tokens of a prompt, and of the text after it."""
_BEFORE = 64
"""Sequences to search for the beginning of a document: as many as the packer keeps open."""
_LOOKS = 512
"""Most sequences to read. A store with few suitable documents gives fewer prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The beginning of a held-out document."""

    sequence: int
    """Index of its sequence in the store."""
    document: int
    """Index of the document in the corpus split."""
    tokens: tuple[int, ...]
    next: tuple[int, ...]
    """The document's own next tokens, at most `NEW_TOKENS`."""
    ended: bool = False
    """Whether the document ends with `next`, as far as its sequence shows."""


def first_sequences(corpus: SequenceFile) -> dict[int, int]:
    """Sequence of a corpus in which each document begins, by document."""
    found: dict[int, int] = {}
    for block in corpus.batches(BLOCK_SEQUENCES):
        ids = np.repeat(block.ids, block.document_ids.lengths)
        for document, sequence in zip(
            block.document_ids.values.tolist(), ids.tolist(), strict=True
        ):
            found.setdefault(document, sequence)
    return found


def choose_prompts(
    store: StoreReader, count: int, seed: int, begins: Mapping[int, int] | None = None
) -> list[Prompt]:
    """Beginnings of `count` random documents, or of fewer in a small store.

    The prompt of a text is its first `PROMPT_TOKENS` tokens, or the first half of a short text. A
    document with a prompt and an answer gives its prompt. A document in several parts gives only
    its first part.

    begins  sequence of the corpus in which each document begins; without it the first part is
            searched near the others, where it is with few exceptions
    """
    order = np.random.default_rng(seed).permutation(len(store))[:_LOOKS]
    found: dict[int, Prompt] = {}
    for row in order.tolist():
        if len(found) >= count:
            break
        sequences = store.read(np.array([row])).sequences
        own = int(sequences.ids[0])
        prompt = next(
            (
                one
                for one in _beginnings(sequences, row)
                if one.document not in found and not _is_later_piece(store, one, own, begins)
            ),
            None,
        )
        if prompt is not None:
            found[prompt.document] = prompt
    return list(found.values())


def _beginnings(sequences: Sequences, row: int) -> Iterator[Prompt]:
    """Beginnings of those documents in one sequence that are long enough."""
    tokens_T, starts_D = sequences.tokens[0], sequences.document_starts[0]
    ends_D = [*starts_D[1:].tolist(), len(tokens_T)]
    supervised_M = sequences.positions[0]
    documents_D = sequences.document_ids[0].tolist()
    for start, end, document in zip(starts_D.tolist(), ends_D, documents_D, strict=True):
        inside = supervised_M[(supervised_M >= start) & (supervised_M < end)]
        if not len(inside):
            continue
        # the first position with a target is the last token of the prompt
        given = int(inside[0]) + 1 - start
        length = min(PROMPT_TOKENS, (end - start) // 2) if given == 1 else given
        if _LEAST <= length <= _MOST_PROMPT and start + length + _LEAST <= end:
            middle = start + length
            yield Prompt(
                sequence=row,
                document=document,
                tokens=tuple(tokens_T[start:middle].tolist()),
                next=tuple(tokens_T[middle : min(end, middle + NEW_TOKENS)].tolist()),
                # the last document of a sequence may continue in another sequence
                ended=end <= middle + NEW_TOKENS and end < len(tokens_T),
            )


def _is_later_piece(
    store: StoreReader, prompt: Prompt, sequence: int, begins: Mapping[int, int] | None
) -> bool:
    """Whether the prompt, in the sequence with id `sequence`, is in a later part of a document."""
    if begins is not None:
        return begins.get(prompt.document) != sequence
    earlier = np.arange(max(0, prompt.sequence - _BEFORE), prompt.sequence)
    if not len(earlier):
        return False
    documents = store.read(earlier).sequences.document_ids.values
    return bool((documents == prompt.document).any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How tokens are sampled, the same for every model."""

    seed: int
    temperature: float
    """Sampling temperature, above 0."""
    vocabulary: int
    """V: rows of the logits beyond it are padding."""


@torch.no_grad()
def continued(
    model: Any, prompts: Sequence[Prompt], drawing: Drawing, ends: frozenset[int]
) -> list[list[int]]:
    """The model's continuation of each prompt, up to `NEW_TOKENS` tokens.

    ends  ids that end a document; generation stops after one of them
    """
    # scaling that depends on the length makes the cache of a shorter text invalid
    scaled = bool(scale_by_document(model))
    longest = context_length(model.config)
    steps = np.arange(NEW_TOKENS, dtype=np.int32)
    found = []
    for prompt in prompts:
        room = NEW_TOKENS if longest is None else max(0, longest - len(prompt.tokens))
        draws = uniform(drawing.seed, np.full(NEW_TOKENS, prompt.sequence, np.int64), steps)
        found.append(
            _written(model, prompt, draws[:room].tolist(), drawing, ends, cached=not scaled)
        )
    return found


def _written(
    model: Any,
    prompt: Prompt,
    draws: list[float],
    drawing: Drawing,
    ends: frozenset[int],
    *,
    cached: bool,
) -> list[int]:
    """One token for every random number, unless an end comes first.

    cached  whether the cache of a text is valid for a longer one
    """
    settings, name = call_settings(model)
    text, cache = list(prompt.tokens), None
    for draw in draws:
        # without a cache the whole text is the input
        new = text if cache is None else text[-1:]
        ids_BT = torch.tensor([new], device=model.device)
        output = model(input_ids=ids_BT, use_cache=cached, **settings, **{name: cache})
        cache = getattr(output, name, None) if cached else None
        logits_V = output.logits[0, -1, : drawing.vocabulary].double() / drawing.temperature
        text.append(_drawn(logits_V, draw))
        if text[-1] in ends:
            break
    return text[len(prompt.tokens) :]


def _drawn(logits_V: torch.Tensor, draw: float) -> int:
    """The token whose share of [0, 1) contains the random number; the most probable one is first.

    So two models with the same most probable token choose it for the same numbers.
    """
    order_V = logits_V.argsort(descending=True, stable=True)
    ends_V = logits_V[order_V].softmax(0).cumsum(0)
    place = int(torch.searchsorted(ends_V, draw * ends_V[-1:], right=True))
    # rounding can exceed the last index
    return int(order_V[min(place, len(order_V) - 1)])
