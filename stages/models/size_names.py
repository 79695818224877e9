"""What the families of transformers call the sizes of a model in their configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZE_NAMES: dict[str, tuple[str, ...]] = {
    "layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "num_decoder_layers",
    ),
    # the last ones are widths of the embedding that a family may choose apart from the rest
    "hidden": (
        "hidden_size",
        "n_embd",
        "d_model",
        "word_embed_proj_dim",
        "embedding_size",
        "input_embedding_size",
    ),
    "heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "attention_heads",
        "decoder_attention_heads",
        "num_decoder_attention_heads",
        "swa_num_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"),
    # of a mixture of experts: of its dense layers, of each expert and of the shared expert
    "feed_forward": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "decoder_ffn_dim",
        "dim_ff",
        "dff",
        "d_inner",
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "dense_intermediate_size",
    ),
    "context": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "context_length",
        "model_max_length",
    ),
    "tied": ("tie_word_embeddings",),
}
"""A recipe's key -> names for it, the usual one first."""


def size_in(config: Mapping[str, Any], key: str) -> int:
    """A size in a configuration as it stands in `config.json`; 0 if it does not say. A list has one
    number for each layer: the largest counts."""
    for name in SIZE_NAMES[key]:
        value = config.get(name)
        if isinstance(value, list):
            value = max((one for one in value if isinstance(one, int)), default=0)
        if value and not isinstance(value, bool | str | dict):
            return int(value)
    return 0
