"""Models and tokenizers: loading, making, and naming them. Any causal language model will do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ..data.errors import ColdstillError
from ..data.fingerprint import files_sha256, json_sha256, tokens_sha256
from ..data.manifest import TeacherIdentity, TokenizerIdentity
from .device import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .config import ArchitectureConfig


def load_tokenizer(name: str, where: str, revision: str = "main") -> Any:
    """The tokenizer of a folder or a hub name.

    Raises
        ColdstillError: there is none, or it is not a fast one (`where` names the recipe's key)
    """
    _expect_present(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise ColdstillError(
            f"{where}: no tokenizer in {_searched(name)}: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ColdstillError(
            f"{where}: the tokenizer of {name} is of a slow kind that cannot tell which characters "
            "a token covers; convert it to tokenizer.json"
        )
    return tokenizer


def load_model(
    name: str,
    where: str,
    *,
    precision: str,
    attention: str | None = None,
    revision: str = "main",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model in evaluation mode, on the CPU unless `options` say where.

    precision  `fp32`, `bf16`, `fp16`, or `auto` for what the checkpoint says
    options    for `from_pretrained`

    Raises
        ColdstillError: there is no such model, or it is not a causal language model
    """
    _expect_present(name, where)
    dtype = "auto" if precision == "auto" else DTYPES[precision]
    own = {} if attention is None else {"attn_implementation": attention}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, **own, **(options or {})
        )
    except Exception as error:  # likewise
        raise ColdstillError(
            f"{where}: cannot load {_searched(name)}: {_first_line(error)}"
        ) from error
    return model.eval()


def expect_sizes(architecture: ArchitectureConfig, where: str) -> None:
    """Refuse sizes of a new model that do not divide, as `build_model` does."""
    if architecture.hidden % architecture.heads:
        raise ColdstillError(
            f"{where}: hidden = {architecture.hidden} is not a multiple of heads = "
            f"{architecture.heads}"
        )
    kv_heads = architecture.kv_heads or architecture.heads
    if architecture.heads % kv_heads:
        raise ColdstillError(
            f"{where}: heads = {architecture.heads} is not a multiple of kv_heads = {kv_heads}"
        )


def build_model(
    architecture: ArchitectureConfig, tokenizer: Any, sequence_length: int, seed: int, where: str
) -> Any:
    """A new model with random weights, as large as `architecture` says.

    Raises
        ColdstillError: unknown family, or sizes that do not divide
    """
    expect_sizes(architecture, where)
    kv_heads = architecture.kv_heads or architecture.heads
    feed_forward = architecture.feed_forward or -(-architecture.hidden * 8 // (3 * 32)) * 32
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary_size(tokenizer),
        "hidden_size": architecture.hidden,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": kv_heads,
        "head_dim": architecture.hidden // architecture.heads,
        "intermediate_size": feed_forward,
        "max_position_embeddings": architecture.context or 4 * sequence_length,
        "tie_word_embeddings": architecture.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture.family == "gpt2":  # the one common family with names of its own
        sizes |= {"n_inner": feed_forward}
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            del sizes[name]
    try:
        config = AutoConfig.for_model(architecture.family, **sizes)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise ColdstillError(
            f"{where}: cannot make a {architecture.family!r} model: {_first_line(error)}"
        ) from error
    return model.eval()


def vocabulary_size(tokenizer: Any) -> int:
    """V, the real vocabulary: one past the largest id that stands for a token."""
    return int(max(tokenizer.get_vocab().values())) + 1


def without_padding(model: Any, vocabulary: int) -> Any:
    """The model itself, its embedding and head cut to the rows that are tokens: rows past them are
    padding, and whoever draws from all of them writes tokens that do not exist.

    vocabulary  V, no more than it has rows
    """
    if model.get_output_embeddings().weight.shape[0] == vocabulary:
        return model
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None and embedding.padding_idx >= vocabulary:
        embedding.padding_idx = None  # its row goes
    config = model.config.get_text_config()
    if isinstance(config.pad_token_id, int) and config.pad_token_id >= vocabulary:
        config.pad_token_id = None
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def context_length(config: Any) -> int | None:
    """The longest input a model takes, or None if its configuration does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    return int(length) if length else None


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """What a store records of a tokenizer."""
    return TokenizerIdentity(
        fingerprint=tokens_sha256(tokenizer.get_vocab()), size=vocabulary_size(tokenizer)
    )


def teacher_identity(name: str, where: str, *, dtype: str, revision: str) -> TeacherIdentity:
    """What a store records of its teacher: everything that decides what it says. Reads its files,
    but does not load it.

    Raises
        ColdstillError: there is no such model
    """
    _expect_present(name, where)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise ColdstillError(
            f"{where}: cannot load {_searched(name)}: {_first_line(error)}"
        ) from error
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ColdstillError(f"{where}: {folder} holds no *.safetensors or *.bin weights")
    try:
        parameters = sum(_count_parameters(path) for path in weights)
    except Exception as error:  # likewise of its many formats
        raise ColdstillError(
            f"{where}: damaged weights in {folder}: {_first_line(error)}; fetch or save them again"
        ) from error
    settings = config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        settings.pop(key, None)
    own = str(getattr(config, "dtype", None) or torch.float32)
    return TeacherIdentity(
        name=folder.name if Path(name).is_dir() else name,
        fingerprint=json_sha256([files_sha256(weights), settings]),
        family=config.model_type,
        dtype=(own if dtype == "auto" else str(DTYPES[dtype])).removeprefix("torch."),
        parameters=parameters,
        bytes=sum(path.stat().st_size for path in weights),
    )


def expect_same_tokens(tokenizer: Any, other: Any, who: str) -> None:
    """Refuse a student whose ids mean something else.

    Compares the tables token by token: two models of one family often differ in padded size and
    still share their tokens, and two of equal size may share none.

    Raises
        ColdstillError: the first id that differs, with both tokens
    """
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ColdstillError(
                f"{who}: its tokenizer is not the teacher's: id {index} is "
                f"{theirs.get(index)!r}, the teacher's is {ours.get(index)!r}; a student must "
                "share the teacher's tokens"
            )


def _expect_present(name: str, where: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir() and "/" in name:
        raise ColdstillError(f"{where}: no folder {name}")


def _searched(name: str) -> str:
    """Where a model was looked for: a misspelled folder reads like a name on the hub."""
    return name if Path(name).is_dir() else f"{name} (no folder here, so taken for one on a hub)"


def _count_parameters(path: Path) -> int:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return sum(tensor.numel() for tensor in state.values())


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
