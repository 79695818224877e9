"""Weight files, sizes and families of models, by the names of transformers. Imports no torch.

A folder may hold the same weights twice (`consolidated.safetensors` beside `model.safetensors`),
and files that are not weights (`optimizer.pt`, `training_args.bin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

UNPACKED = frozenset(
    {
        "bailing_hybrid", "bamba", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small",
        "bloom", "camembert", "data2vec-text", "falcon_h1", "falcon_mamba", "granitemoehybrid",
        "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lara_mini",
        "lfm3", "mamba", "mamba2", "marian", "mbart", "minimax", "mvp", "nemotron_h", "olmo_hybrid",
        "openai-gpt", "pegasus", "plbart", "prophetnet", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "roberta", "roberta-prelayernorm",
        "rwkv", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "xmod", "zamba2", "zaya",
    }
)  # fmt: skip
"""Families that cannot isolate documents of one sequence: recurrent ones, and ones that count
positions differently. Families of which some models can, such as LFM2 without convolutions, are not
listed. The list warns before a teacher packs a store that no such student could use, or works for
one that is to learn from branches; training itself tests the model (`isolation.py`,
`branching.py`)."""


def without_branches(family: str, where: str, why: str = "") -> ColdstillError:
    """The refusal of a model that is to learn from branches and cannot read them."""
    return ColdstillError(
        f"{where}: a {family!r} model does not read branches as it reads a text, so it cannot "
        f"learn from them{why}; take branches out of the objective"
    )


SIZE_NAMES: dict[str, tuple[str, ...]] = {
    "layers": (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
        "num_decoder_layers",
    ),
    # the last three are widths of the embedding, which some families choose separately
    "hidden": (
        "hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size",
        "input_embedding_size",
    ),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
        "decoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"),
    # a mixture of experts has widths of its dense layers, each expert and the shared expert
    "feed_forward": (
        "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "dim_ff",
        "dff", "d_inner", "moe_intermediate_size", "expert_ffn_hidden_size",
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
        "shared_experts_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp",
        "dense_intermediate_size",
    ),
    "context": (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
        "model_max_length",
    ),
    "tied": ("tie_word_embeddings",),
}  # fmt: skip
"""Key of a recipe -> names of that setting in `config.json`, the most common name first."""


def size_in(config: Mapping[str, Any], key: str) -> int:
    """A size in the content of `config.json`; 0 if it is not set.

    A list has one number per layer: the largest counts.
    """
    for name in SIZE_NAMES[key]:
        value = config.get(name)
        if isinstance(value, list):
            value = max((one for one in value if isinstance(one, int)), default=0)
        if value and not isinstance(value, bool | str | dict):
            return int(value)
    return 0


ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""transformers loads the first of these files that exists."""
INDEX_END = ".index.json"


UNPACKED_RECORD = "gguf.json"
"""Describes, in a folder that `gguf_file.py` unpacked, the file that it was made of."""


def stored_weights(folder: Path) -> str:
    """How a GGUF file stored the weights of a folder, as one phrase; empty for other folders."""
    record = folder / UNPACKED_RECORD
    return str(read_json(record)["weights"]) if record.is_file() else ""


def weight_files_in(folder: Path) -> list[Path]:
    """The existing weight files of a model's folder; empty if it has no weights."""
    found = next((folder / name for name in ORDER if (folder / name).is_file()), None)
    if found is None:
        return []
    if not found.name.endswith(INDEX_END):
        return [found]
    return [path for shard in shards(found) if (path := folder / shard).is_file()]


def shards(index: Path) -> list[str]:
    """The weight files that an index lists.

    Raises
        ColdstillError: the index lists no weight files
    """
    match read_json(index):
        case {"weight_map": dict(listed)} if listed and all(
            isinstance(shard, str) for shard in listed.values()
        ):
            return sorted(set(listed.values()))
    raise ColdstillError(
        f"{index}: no weight_map that names weight files; fetch or save the model again"
    )
