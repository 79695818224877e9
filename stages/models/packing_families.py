"""Which families cannot keep documents of one sequence apart, known by name: before a teacher has
packed its store, which no student of such a family could learn from."""

from __future__ import annotations

UNPACKED = frozenset(
    {
        "bailing_hybrid", "bamba", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small",
        "bloom", "camembert", "data2vec-text", "falcon_h1", "falcon_mamba", "granitemoehybrid",
        "jamba", "lara_mini", "mamba", "marian", "mbart", "minimax", "mvp", "olmo_hybrid",
        "openai-gpt", "pegasus", "plbart", "prophetnet", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "roberta", "roberta-prelayernorm",
        "rwkv", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "xmod",
    }
)  # fmt: skip
"""Recurrent families, and families that count positions in their own way. A model is always tried
itself before it trains (`isolation`)."""
