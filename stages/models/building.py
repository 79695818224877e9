"""Making new models with random weights, as large as a recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ...data.errors import ColdstillError
from ..libraries import first_line
from .vocabulary import vocabulary_size

if TYPE_CHECKING:
    from ..config import ArchitectureConfig


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
            f"{where}: cannot make a {architecture.family!r} model: {first_line(error)}"
        ) from error
    return model.eval()
