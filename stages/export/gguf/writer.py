"""Writes GGUF files with the `gguf` package: a model and its tokenizer in f16, q8_0 or q4_0.

llama.cpp splits text before merging by built-in rules, which a file selects by name. A tokenizer
with another rule is refused. If llama.cpp is installed, its tokens are compared with the
tokenizer's on held-out text before an export is kept.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from ....data.errors import ColdstillError
from ...models.ends import names, own_ends
from .architectures import ARCHITECTURES, Architecture, rotary, window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..contract import LoadedStudent

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


def tokens_refusal(tokenizer: Any) -> str | None:
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


_BLOCK = 32
"""Consecutive weights of a row that share a scale."""


def _write_to_disk(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ALWAYS_F32 = ("position_embd.weight",)
"""Matrices that stay in f32 in llama.cpp's own files."""
_KINDS = gguf.GGMLQuantizationType
_FILE_TYPES = {
    _KINDS.F16: gguf.LlamaFileType.MOSTLY_F16,
    _KINDS.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    _KINDS.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


def write_gguf(student: LoadedStudent, path: Path, precision: str = "f16") -> Sequence[str]:
    """Write the file, and return notes about what differs from the student.

    precision  of matrices: `f16`, `q8_0` or `q4_0`. With `q4_0` the output head has q8_0, as nearly
               in llama.cpp's own files (q6_K, or q8_0 where rows are no multiple of 256).

    Raises
        ColdstillError: llama.cpp has no name for a tensor
    """
    model, architecture = student.model, ARCHITECTURES[student.family]
    settings = architecture.settings(model.config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(student.name)
    wanted = _KINDS[precision.upper()]
    writer.add_file_type(_FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**settings, "vocab_size": student.vocabulary}.items():
        _add(writer, f"{architecture.name}.{key}", value)
    ends = end_slots(student.tokenizer, own_ends(model), student.ends.tokens)
    add_tokens(writer, student.tokenizer, student.vocabulary, ends[:END_SLOTS])
    kept, of_head = 0, {"output.weight"}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        of_head.add("token_embd.weight")
    for name, tensor in _tensors(student, architecture):
        kind = _KINDS.Q8_0 if wanted == _KINDS.Q4_0 and name in of_head else wanted
        if tensor.ndim == 1 or name in _ALWAYS_F32:
            kind = _KINDS.F32
        elif tensor.shape[-1] % _BLOCK and kind != _KINDS.F16:
            kind, kept = _KINDS.F16, kept + 1
        content = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
        writer.add_tensor(name, content, raw_dtype=kind)
    _write_to_disk(writer)
    notes = []
    if kept:
        notes.append(
            f"{kept} matrices stay f16: the length of their rows is not a multiple of {_BLOCK}"
        )
    size = window(model.config)
    if "attention.sliding_window" not in settings and size == settings["context_length"]:
        notes.append(
            f"its context is {size:,} tokens, that of its sliding window, and it was checked "
            "within it: llama.cpp has no sliding window for this family"
        )
    if left_out := ends[END_SLOTS:]:
        notes.append(
            f"a GGUF file can name {END_SLOTS} tokens at which llama.cpp stops; not among them: "
            f"{names(student.tokenizer, left_out)}; pass their text as further stops (-r, or stop=)"
        )
    return notes


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _tensors(
    student: LoadedStudent, architecture: Architecture
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor in llama.cpp's layout, with llama.cpp's name."""
    model, config = student.model, student.model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    # a tied matrix has two names
    for name, weight in model.named_parameters(remove_duplicate=False):
        of_head = weight is head and not name.startswith(model.base_model_prefix)
        if of_head and head is embedding and architecture.may_tie:
            continue
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ColdstillError(
                f"students.{student.name}: llama.cpp has no name for the tensor {name} of a "
                f"{student.family!r} model"
            )
        yield theirs, architecture.change(name, weight.detach().float().numpy(), config)
    factors = _rotary_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _rotary_factors(model: Any) -> NDArray[np.float32] | None:
    """[D / 2] divisors of the rotary frequencies; None for unscaled frequencies."""
    kinds = {rope.get("rope_type", "default") for rope in rotary(model.config)}
    if kinds <= {"default"}:
        return None
    (rope,) = rotary(model.config)
    scaled = model.base_model.rotary_emb.inv_freq.float().numpy()
    places = np.arange(len(scaled)) / len(scaled)
    plain = float(rope["rope_theta"]) ** -places
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors
