"""Writes a tokenizer into a GGUF file: tokens, their types, merges or scores, special tokens.

llama.cpp splits text before merging by rules that it knows by name. A tokenizer with another rule
is refused. If llama.cpp is installed, its tokens are compared with the tokenizer's on held-out text
before an export is kept.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
}
"""Patterns that split text, and llama.cpp's names for them."""
END_SLOTS = 3
"""Number of tokens at which llama.cpp stops that a file can name."""
_LAST_SCORE = -1e6
"""Score of tokens that no merge makes: below all others."""


def refusal(tokenizer: Any) -> str | None:
    """Why llama.cpp would not split text into the same tokens; None if it would."""
    parts = _parts(tokenizer)
    kind = parts["model"]["type"]
    if kind != "BPE":
        return f"a tokenizer of the kind {kind!r}; only 'BPE' is supported"
    if _is_byte_level(parts) and _split_name(parts) is None:
        return "a tokenizer that splits text by a rule that is not among the known ones"
    return None


def add_tokens(writer: Any, tokenizer: Any, vocabulary: int, ends: Sequence[int] = ()) -> None:
    """Write the tokenizer of a model with `vocabulary` rows.

    Byte-level merges are those of GPT-2, Llama 3 and Qwen. The others merge characters and fall
    back on bytes (Llama 2, Mistral, Gemma).

    ends  tokens at which the model stops, in the order of `end_slots`, at most `END_SLOTS`
    """
    parts = _parts(tokenizer)
    by_bytes = _is_byte_level(parts)
    tokens, types = _table(parts, vocabulary, by_bytes=by_bytes)
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in parts["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(_split_name(parts) if by_bytes else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if by_bytes:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_begins_with_space(parts))
    _add_special(writer, tokenizer, ends)


def _parts(tokenizer: Any) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return parts


def _steps(part: Any) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [part])


def _is_byte_level(parts: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))


def _split_name(parts: dict[str, Any]) -> str | None:
    steps = _steps(parts["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    if last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if last.get("use_regex", True) else None
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm" if last.get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        return SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None


def _begins_with_space(parts: dict[str, Any]) -> bool:
    steps = _steps(parts["normalizer"]) + _steps(parts["pre_tokenizer"])
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _table(
    parts: dict[str, Any], vocabulary: int, *, by_bytes: bool
) -> tuple[list[str], list[int]]:
    """Text and type of every token, by id."""
    from gguf import TokenType

    model = parts["model"]
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    for token, index in model["vocab"].items():
        is_byte = not by_bytes and len(token) == 6 and token[:3] == "<0x" and token[-1] == ">"
        tokens[index] = token
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in parts["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if not by_bytes and added["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores by token id. llama.cpp merges the pair whose result has the highest score, so the
    first merge gets the highest."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first[token]) if token in first else _LAST_SCORE for token in tokens]


def end_slots(tokenizer: Any, ends: Sequence[int], measured: Sequence[int] = ()) -> list[int]:
    """All tokens at which a model stops, in the order of llama.cpp's names for them.

    The names are end of text, end of turn, end of message. llama.cpp also appends the first one to
    a text, and inserts it as a chat template's `eos_token`. So the tokenizer's own end of text
    comes first wherever it is used.

    ends      tokens at which the model stops
    measured  tokens that end its held-out texts, the most frequent first
    """
    own = tokenizer.eos_token_id
    if own is None:
        return list(ends)
    used = (
        not measured
        or own in measured
        or _appends_end(tokenizer)
        or "eos_token" in str(tokenizer.chat_template or "")
    )
    first = [own, *measured] if used else [*measured, own]
    return list(dict.fromkeys([*first, *ends]))


def _appends_end(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def _add_special(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    names = ("bos", "eos", "unk", "pad")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    special |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    for name, index in special.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(_appends_end(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
