"""Every family of transformers' causal language models works, or is refused in one line.

`COLDSTILL_FAMILIES=all` also writes every export of every family and opens it again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.stages.export import FORMATS, unable
from coldstill.stages.models.model_files import UNPACKED
from families import FAMILIES, STEPS, WORKS, walk

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ALL = os.environ.get("COLDSTILL_FAMILIES") == "all"
USUAL = ("gpt2", "opt", "bloom", "falcon", "gpt_neo", "gptj", "llama", "mistral", "phi", "qwen2",
         "qwen3", "gemma2", "olmo2", "stablelm")  # fmt: skip
"""Families that must work in all these steps and may not be refused."""
SLOW = {"bamba", "falcon_h1", "granitemoehybrid", "zamba2", "mamba2", "nemotron_h",
        "qwen4_exp_text", "bailing_hybrid", "deepseek_v32", "longcat_flash", "dots3_note_text",
        "minimax_m2", "glm_moe_dsa"}  # fmt: skip
"""State-space layers without their own kernels, and hundreds of experts at any size."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_its_own_model_or_is_refused_in_one_line(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    if family in SLOW and not ALL:
        pytest.skip("slow at any size; COLDSTILL_FAMILIES=all runs it")
    formats = tuple(FORMATS) if ALL else ("hf",) if family in (*USUAL, "rwkv", "mamba") else ()
    walked = walk(family, tokenizer, tmp_path, formats)
    assert set(walked.steps) <= set(STEPS)
    for name in unable(family, tuple(FORMATS)):
        assert walked.steps.get(name) != WORKS, name  # as coldstill plan reports
    if family in UNPACKED and walked.steps.get("capture") == WORKS:
        assert not walked.packs
    if family in USUAL:
        refused = {step: line for step, line in walked.steps.items() if line != WORKS}
        assert not refused.keys() & {"plan", "build", "capture", "student", "lora", "hf"}, refused
    if family in ("rwkv", "mamba"):
        assert walked.steps["hf"] == WORKS
        assert "has no plain key-value cache; use --to hf" in walked.steps["onnx"]
