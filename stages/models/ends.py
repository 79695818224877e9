"""How a model stops: end tokens measured in a corpus, and generation settings that can be saved.

A student's texts end as the documents and chat turns of its corpus do, which need not be the
tokenizer's end of text. So end tokens are measured: tokens that are last where a supervised part
ends, and hardly occur anywhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.alignment import label_places, labels
from ...data.errors import first_line
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ...data.prepared import SequenceFile
    from ...data.schema import Sequences
    from ...data.store.reader import StoreReader

_BLOCKS, _DISTANT_BLOCKS = 32, 8
"""Blocks of a local and of a remote store that are read, evenly spaced. Each may be in a different
shard, which a remote store sends whole."""
_SEQUENCES = 2048
"""Sequences of a corpus that are read, evenly spaced."""
_BEHIND = 1
"""Tokens that may follow an end token, such as a line break after a turn that is supervised too."""
_SHARE = 0.9
"""Smallest share of a token's supervised occurrences that are ends. A token that also occurs inside
answers would cut them off."""
_RARE = 0.001
"""Smallest share of all ends. Documents that were cut to fit a sequence end with any token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The end tokens of a corpus."""

    tokens: tuple[int, ...] = ()
    """Ids that end a text, the most frequent first."""
    lack: str = ""
    """Why the documents have no end token, and what to do; empty if they have one."""


def own_ends(model: Any) -> tuple[int, ...]:
    """Ids at which a model stops by its saved settings."""
    for settings in (model.generation_config, model.config.get_text_config()):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, list | tuple) else [found]))
    return ()


def stop_at(model: Any, tokens: Sequence[int]) -> bool:
    """Make a model stop at these tokens too; returns whether that changed its saved settings."""
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
    """Make a trained model stop at these end tokens; report new ones and missing ones."""
    if stop_at(model, ends.tokens):
        shown = names(tokenizer, ends.tokens)
        report(Report(stage=stage, note=f"texts end with {shown}: the model stops there"))
    if ends.lack:
        report(Report(stage=stage, note=ends.lack, warning=True))


def with_end(tokenizer: Any, tokens: Sequence[int]) -> Any:
    """Set the tokenizer's end of text to the first token if it has none; returns the tokenizer."""
    if tokenizer.eos_token_id is None and tokens:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[0])
    return tokenizer


def names(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Tokens for messages: `'<s>' (1), '</s>' (2)`."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in tokens)


def store_ends(store: StoreReader, tokenizer: Any) -> Ends:
    """The end tokens of a store."""
    return measured_ends(_of_store(store), tokenizer, store.manifest.packing.separator)


def corpus_ends(corpus: SequenceFile, tokenizer: Any, separator: Sequence[int]) -> Ends:
    """The end tokens of a prepared corpus; `separator` as in `measured_ends`."""
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(_SEQUENCES, len(corpus))).astype(np.int64))
    return measured_ends([corpus.read(rows)] if len(rows) else [], tokenizer, separator)


def _of_store(store: StoreReader) -> Iterator[Sequences]:
    ends_S = np.cumsum([store.manifest.blocks(shard) for shard in store.done], dtype=np.int64)
    blocks = int(ends_S[-1]) if len(ends_S) else 0
    most = min(blocks, _BLOCKS if store.place.room is None else _DISTANT_BLOCKS)
    for place in np.unique(np.linspace(0, blocks - 1, most).astype(np.int64)).tolist():
        index = int(np.searchsorted(ends_S, place, side="right"))
        shard = store.done[index]
        number = place - int(ends_S[index]) + store.manifest.blocks(shard)
        yield store.block(shard, number).sequences


def measured_ends(parts: Iterable[Sequences], tokenizer: Any, separator: Sequence[int]) -> Ends:
    """End tokens: special tokens, or a separator that occurs nowhere else.

    separator  the ids after each plain document; empty if there are none
    """
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    known = special | set(separator if len(separator) == 1 else ())
    # these count as ends everywhere: a file may hold several documents that were joined
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
    """[E] indices of the supervised positions that end a supervised run.

    A run is a document, the answer to a prompt or a turn of a chat.
    """
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
    remedy = "set corpus.separator to a token that occurs nowhere else"
    if not separator:
        return f"no token follows its documents, so no token stops its generation; {remedy}"
    if not separated:
        return "no text ends with an end token, so no token stops its generation"
    text = tokenizer.decode(list(separator))
    why = (
        f"which is {len(separator)} tokens"
        if len(separator) > 1
        else "which also occurs inside them"
    )
    return (
        f"its documents end with {text!r}, {why}, so no token stops its generation: pass that "
        f"text to the runtime (stop_strings in transformers, stop in llama.cpp), or {remedy}"
    )


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")
"""Settings that are kept; the others are only defaults for sampling."""


def repair_generation(model: Any) -> str | None:
    """Remove generation settings that cannot be saved; returns a note that lists them.

    Published models have settings that contradict each other, such as a temperature without
    sampling. transformers loads them, but refuses to save them after any other change. Without the
    repair this error would appear only after training.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return None
    dropped: dict[str, Any] = {}
    reason = _refusal(settings)
    while reason is not None:
        named = [
            name
            for name in re.findall(r"`(\w+)`", reason)
            if name not in (*_KEPT[:2], "do_sample", *dropped)
            and getattr(settings, name, None) is not None
        ]
        if not named:
            kept = {name: getattr(settings, name) for name in _KEPT[:2]}
            model.generation_config = type(settings)(**kept)
            return (
                "transformers refuses its generation_config.json "
                f"({first_line(ValueError(reason))}); only its special tokens are kept"
            )
        dropped[named[0]] = getattr(settings, named[0])
        setattr(settings, named[0], None)
        reason = _refusal(settings)
    if not dropped:
        return None
    listed = ", ".join(f"{name} = {value!r}" for name, value in dropped.items())
    return f"its generation_config.json has settings without effect, left out: {listed}"


def _refusal(settings: Any) -> str | None:
    """Why transformers would refuse to save these settings; None if it would save them."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # the check itself may fail on a value of another type
        return str(error) or type(error).__name__
    return None
