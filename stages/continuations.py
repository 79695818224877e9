"""What models make of the beginnings of held-out documents: to be read, not to be measured.

Each model draws its tokens: a small one that always takes the most probable soon says nothing
else. The numbers they draw with are the same for all: where two models agree, so do their texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.order import uniform
from ..data.prepared import BLOCK_SEQUENCES
from .evaluation.generation_speed import call_settings
from .models.loading import context_length
from .models.rotary import scale_by_document

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..data.prepared import SequenceFile
    from ..data.schema import Sequences
    from ..data.store.reader import StoreReader

PROMPT_TOKENS, NEW_TOKENS = 32, 40
_MOST_PROMPT = 256
"""Tokens of a prompt that a corpus gives itself; a longer one is nothing to be read in a minute."""
_LEAST = 8
"""Tokens of a prompt, and of what comes after it."""
_BEFORE = 64
"""Sequences in which the beginning of a document is looked for: a packer holds as many open."""
_LOOKS = 512
"""Sequences that are read at most; a store of few fitting documents gives fewer prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The beginning of a held-out document."""

    sequence: int
    """Of the store."""
    document: int
    """Its place in the corpus split."""
    tokens: tuple[int, ...]
    next: tuple[int, ...]
    """What really came next, at most `NEW_TOKENS`."""
    ended: bool = False
    """Whether the document ends with that, as far as its sequence tells."""


def first_sequences(corpus: SequenceFile) -> dict[int, int]:
    """In which sequence of a corpus each of its documents begins."""
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
    """Beginnings of documents, in a seeded order, no two of one document; fewer where the store
    has not so many.

    Of a text the first `PROMPT_TOKENS` tokens, or the first half if it is short; of a prompt with
    its answer the prompt. Of a document that was cut only its first piece counts.

    begins  in which sequence of the corpus each document begins; without it the first piece is
            looked for near the others, where it is in all but few cases

    Raises
        ColdstillError: the store is damaged
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
    """Of one sequence's documents, those that are long enough."""
    tokens_T, starts_D = sequences.tokens[0], sequences.document_starts[0]
    ends_D = [*starts_D[1:].tolist(), len(tokens_T)]
    supervised_M = sequences.positions[0]
    documents_D = sequences.document_ids[0].tolist()
    for start, end, document in zip(starts_D.tolist(), ends_D, documents_D, strict=True):
        inside = supervised_M[(supervised_M >= start) & (supervised_M < end)]
        if not len(inside):
            continue
        # the first position with a target is that of the last token of a prompt
        asked = int(inside[0]) + 1 - start
        length = min(PROMPT_TOKENS, (end - start) // 2) if asked == 1 else asked
        if _LEAST <= length <= _MOST_PROMPT and start + length + _LEAST <= end:
            middle = start + length
            yield Prompt(
                sequence=row,
                document=document,
                tokens=tuple(tokens_T[start:middle].tolist()),
                next=tuple(tokens_T[middle : min(end, middle + NEW_TOKENS)].tolist()),
                # the last document of a sequence may go on in another
                ended=end <= middle + NEW_TOKENS and end < len(tokens_T),
            )


def _is_later_piece(
    store: StoreReader, prompt: Prompt, sequence: int, begins: Mapping[int, int] | None
) -> bool:
    """Whether it stands within a document that was cut, and not at its beginning.

    sequence  the id of the prompt's sequence
    """
    if begins is not None:
        return begins.get(prompt.document) != sequence
    earlier = np.arange(max(0, prompt.sequence - _BEFORE), prompt.sequence)
    if not len(earlier):
        return False
    documents = store.read(earlier).sequences.document_ids.values
    return bool((documents == prompt.document).any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How tokens are drawn: the same for every model."""

    seed: int
    temperature: float
    """Above 0."""
    vocabulary: int
    """V: rows of the logits past it are padding."""


@torch.no_grad()
def continued(
    model: Any, prompts: Sequence[Prompt], drawing: Drawing, ends: frozenset[int]
) -> list[list[int]]:
    """What it writes after each prompt, up to `NEW_TOKENS` tokens.

    ends  ids after which a document has ended; one of them is the last that is written
    """
    # with other positions for longer texts, what was remembered of a shorter one is of no use
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
    """A token for every draw, unless an end comes first.

    cached  whether what was computed for a text still holds when it has become longer
    """
    settings, name = call_settings(model)
    text, cache = list(prompt.tokens), None
    for draw in draws:
        # a model that gives no cache to go on with reads everything again
        asked = text if cache is None else text[-1:]
        ids_BT = torch.tensor([asked], device=model.device)
        output = model(input_ids=ids_BT, use_cache=cached, **settings, **{name: cache})
        cache = getattr(output, "past_key_values", None) if cached else None
        logits_V = output.logits[0, -1, : drawing.vocabulary].double() / drawing.temperature
        text.append(_drawn(logits_V, draw))
        if text[-1] in ends:
            break
    return text[len(prompt.tokens) :]


def _drawn(logits_V: torch.Tensor, draw: float) -> int:
    """The token in whose share of [0, 1) the draw lies, the most probable one's first: so that two
    models with one favourite write it at the same draws, whatever else they think of."""
    order_V = logits_V.argsort(descending=True, stable=True)
    ends_V = logits_V[order_V].softmax(0).cumsum(0)
    place = int(torch.searchsorted(ends_V, draw * ends_V[-1:], right=True))
    # rounding can put it past the end
    return int(order_V[min(place, len(order_V) - 1)])
