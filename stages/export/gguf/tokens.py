"""A tokenizer inside a GGUF file: tokens, their kinds, merges or scores, and the special ones.

llama.cpp splits text before its merges by rules that it knows by name, so only those tokenizers are
written whose rules are among them. Where llama.cpp is installed, its tokens are compared with the
tokenizer's own on held-out text before an export counts as done.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["bytes", "pieces"]
"""Byte-level merges (GPT-2, Llama 3, Qwen), or merges of characters with bytes to fall back on
(Llama 2, Mistral, Gemma)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
}
"""Patterns that text is split by, and llama.cpp's names for them."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
END_SLOTS = 3
"""So many tokens a file can name at which llama.cpp stops."""
_LAST_SCORE = -1e6
"""Of tokens that no merge makes: they come after all others."""


def refusal(tokenizer: Any) -> str | None:
    """Why llama.cpp would not cut text as this tokenizer does, or None."""
    parts = _parts(tokenizer)
    kind = parts["model"]["type"]
    if kind != "BPE":
        return f"a tokenizer of the kind {kind!r}; only 'BPE' is written here"
    if _kind(parts) == "bytes" and _split_name(parts) is None:
        return "a tokenizer that splits text by a rule that is not among those known here"
    return None


def add_tokens(writer: Any, tokenizer: Any, vocabulary: int, ends: Sequence[int] = ()) -> None:
    """Write the tokenizer of a model with `vocabulary` rows.

    ends  where the model stops, as `end_slots` orders them, no more than `END_SLOTS`
    """
    parts = _parts(tokenizer)
    kind = _kind(parts)
    tokens, types = _table(parts, vocabulary, kind)
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in parts["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2" if kind == "bytes" else "llama")
    writer.add_tokenizer_pre(_split_name(parts) if kind == "bytes" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "bytes":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_begins_with_space(parts))
    _add_special(writer, tokenizer, ends)


def _parts(tokenizer: Any) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return parts


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of its steps."""
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [part])


def _kind(parts: dict[str, Any]) -> Kind:
    by_bytes = any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))
    return "bytes" if by_bytes else "pieces"


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


def _table(parts: dict[str, Any], vocabulary: int, kind: Kind) -> tuple[list[str], list[int]]:
    """Every token's text and type, by id."""
    model = parts["model"]
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, index in model["vocab"].items():
        is_byte = kind == "pieces" and len(token) == 6 and token[:3] == "<0x" and token[-1] == ">"
        tokens[index], types[index] = token, _BYTE if is_byte else _NORMAL
    for added in parts["added_tokens"]:
        is_special = added["special"]
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if is_special else _USER
        if kind == "pieces" and added["content"] == model.get("unk_token"):
            types[added["id"]] = _UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """llama.cpp joins the two neighbours whose whole has the highest score: the merge that comes
    first makes the token with the highest."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first[token]) if token in first else _LAST_SCORE for token in tokens]


def end_slots(tokenizer: Any, ends: Sequence[int], measured: Sequence[int] = ()) -> list[int]:
    """All tokens at which a model stops, the tokenizer's own end of text too, in the order of
    llama.cpp's names for them: end of text, end of turn, end of message.

    The first one is also what llama.cpp puts behind a text and writes for a chat template's
    `eos_token`, so it stays the tokenizer's own wherever that is used.

    ends      where the model stops
    measured  those of them with which its texts were seen to end, the most frequent first
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
