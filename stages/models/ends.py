"""Which tokens end a text: what a model stops at, wherever it is run.

A student writes what it was taught: its texts end as the documents and the turns of its corpus do,
whatever the tokenizer calls its end of text. So the ends are measured: the tokens that stand last
where something supervised ends, and hardly anywhere else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.alignment import label_places, labels
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ...data.prepared import SequenceFile
    from ...data.schema import Sequences
    from ...data.store.reader import StoreReader

_BLOCKS, _DISTANT_BLOCKS = 32, 8
"""So many blocks of a store are looked at, evenly spaced: each may lie in a shard of its own, which
a distant store sends whole."""
_SEQUENCES = 2048
"""So many sequences of a corpus are looked at, evenly spaced."""
_BEHIND = 1
"""Tokens that may follow an end token where something supervised ends: a line break after a turn,
in stores that supervise it."""
_SHARE = 0.9
"""Least share of a token's supervised places at which something ends: a token that a model writes
in the middle of its answers too would cut them off."""
_RARE = 0.001
"""Least share of all ends: documents that were cut to fit a sequence end with any token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """How texts end."""

    tokens: tuple[int, ...] = ()
    """Ids after each of which a text has ended, the most frequent first."""
    lack: str = ""
    """Why documents have no such token, as a sentence, and what to do; empty if they have."""


def own_ends(model: Any) -> tuple[int, ...]:
    """The ids at which a model stops by its own settings."""
    for settings in (model.generation_config, model.config.get_text_config()):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, list | tuple) else [found]))
    return ()


def stop_at(model: Any, tokens: Sequence[int]) -> bool:
    """Make a model stop at these tokens and at its own; whether that changes anything. They are
    saved with it."""
    own = own_ends(model)
    if set(tokens) <= set(own):
        return False
    ends = list(dict.fromkeys([*tokens, *own]))
    value = ends[0] if len(ends) == 1 else ends
    if model.generation_config is None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = value
    model.config.get_text_config().eos_token_id = value
    return True


def report_ends(
    model: Any, tokenizer: Any, ends: Ends, stage: str, report: Reporter = silent
) -> None:
    """Make a model that was trained stop where its texts ended, and say so where that is not what
    the tokenizer says."""
    if stop_at(model, ends.tokens):
        said = names(tokenizer, ends.tokens)
        report(Report(stage=stage, note=f"texts end with {said}: the model stops there"))
    if ends.lack:
        report(Report(stage=stage, note=ends.lack, warning=True))


def with_end(tokenizer: Any, tokens: Sequence[int]) -> Any:
    """The tokenizer itself, its end of text the first of these where it has none of its own."""
    if tokenizer.eos_token_id is None and tokens:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[0])
    return tokenizer


def names(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Tokens for people: `'<s>' (1), '</s>' (2)`."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in tokens)


def store_ends(store: StoreReader, tokenizer: Any) -> Ends:
    """How the texts of a store end.

    Raises
        ColdstillError: the store is damaged
    """
    return measured_ends(_of_store(store), tokenizer, store.manifest.packing.separator)


def corpus_ends(corpus: SequenceFile, tokenizer: Any, separator: Sequence[int]) -> Ends:
    """How the texts of a prepared corpus end; `separator` as `measured_ends` takes it.

    Raises
        ColdstillError: the corpus is damaged
    """
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(_SEQUENCES, len(corpus))).astype(np.int64))
    return measured_ends([corpus.read(rows)] if len(rows) else [], tokenizer, separator)


def _of_store(store: StoreReader) -> Iterator[Sequences]:
    manifest = store.manifest
    blocks = [
        (shard, block) for shard in store.done for block in range(len(manifest.block_sizes(shard)))
    ]
    most = min(len(blocks), _BLOCKS if store.place.room is None else _DISTANT_BLOCKS)
    for place in np.unique(np.linspace(0, len(blocks) - 1, most).astype(np.int64)).tolist():
        yield store.block(*blocks[place]).sequences


def measured_ends(parts: Iterable[Sequences], tokenizer: Any, separator: Sequence[int]) -> Ends:
    """How texts end: with special tokens, or with a separator that stands nowhere else.

    separator  the ids that were put after each plain document; none if nothing was
    """
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    known = special | set(separator if len(separator) == 1 else ())
    # wherever these stand, a document ends: a file may hold several that were joined
    sure = special & {*separator, tokenizer.eos_token_id}
    candidates = np.array(sorted(known), dtype=np.int64)
    reach = max(1 + _BEHIND, len(separator))
    ended: Counter[int] = Counter()
    anywhere: Counter[int] = Counter()
    separated = ends = 0
    for sequences in parts:
        ids_M = labels(sequences)
        last_E = _ends(sequences)
        ends += len(last_E)
        anywhere.update(ids_M[np.isin(ids_M, candidates)].tolist())
        for last in last_E.tolist():
            tail = ids_M[max(0, last + 1 - reach) : last + 1].tolist()
            separated += bool(separator) and tail[-len(separator) :] == list(separator)
            ended.update([i for i in reversed(tail) if i in known][:1])
    tokens = tuple(
        token
        for token, count in ended.most_common()
        if count >= _RARE * ends and (token in sure or count >= _SHARE * anywhere[token])
    )
    return Ends(tokens=tokens, lack=_lack(tokens, tokenizer, separator, separated, ends))


def _ends(sequences: Sequences) -> np.ndarray[Any, Any]:
    """[E] which of all supervised positions are the last ones of what is learned without a break: a
    document, the answer to a prompt, a turn of a chat."""
    places_M = label_places(sequences)
    rows_M = np.repeat(np.arange(len(sequences)), sequences.positions.lengths)
    if not len(places_M):
        return np.zeros(0, dtype=np.int64)
    goes_on = (np.diff(places_M) == 1) & (np.diff(rows_M) == 0)
    return np.flatnonzero(np.append(~goes_on, True))


def _lack(
    tokens: Sequence[int], tokenizer: Any, separator: Sequence[int], separated: int, ends: int
) -> str:
    if not ends or (tokens and not separated) or set(separator) & set(tokens):
        return ""
    remedy = "set corpus.separator to a token that stands nowhere else"
    if not separator:
        return f"nothing stands after its documents, so no token tells it to stop; {remedy}"
    if not separated:
        return "none of its texts ends with a token of its own, so no token tells it to stop"
    text = tokenizer.decode(list(separator))
    why = (
        f"which is {len(separator)} tokens"
        if len(separator) > 1
        else "which also stands inside of them"
    )
    return (
        f"its documents end with {text!r}, {why}, so no token tells it to stop: give that text to "
        f"what runs it (stop_strings in transformers, stop in llama.cpp), or {remedy}"
    )
