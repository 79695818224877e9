"""Models and tokenizers: loading, building, identity, and refusals in one line."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import configure, refused
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.models.building import (
    build_model,
    feed_forward_widths,
    layer_count_of,
    unused_heads,
)
from coldstill.stages.models.ends import repair_generation
from coldstill.stages.models.loading import (
    context_length,
    load_model,
    load_tokenizer,
    teacher_identity,
)
from coldstill.stages.models.vocabulary import (
    expect_same_tokens,
    tokenizer_identity,
    vocabulary_size,
)
from conftest import FAMILIES, VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import TeacherIdentity


def identity(folder: Path, dtype: str = "fp32") -> TeacherIdentity:
    return teacher_identity(str(folder), "teacher.model", dtype=dtype, revision="main")


def load(folder: Path, precision: str = "fp32", **options: Any) -> Any:
    return load_model(str(folder), "m", precision=precision, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded_unchanged(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(family, VOCABULARY + 16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    tokens = torch.arange(10)[None] * 7
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    again = load_tokenizer(str(tmp_path), "teacher.model")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert context_length(loaded.config) == 128
    found = identity(tmp_path)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.family == model.config.model_type


def test_the_precision_decides_the_dtype(teacher_folder: Path, tmp_path: Path) -> None:
    half = load(teacher_folder, "bf16")
    assert half.dtype == torch.bfloat16
    assert load(teacher_folder, "auto").dtype == torch.float32
    half.save_pretrained(tmp_path)
    assert load(tmp_path, "auto").dtype == torch.bfloat16
    assert load(tmp_path, "fp32").dtype == torch.float32
    assert identity(tmp_path, "auto").dtype == "bfloat16"
    assert identity(teacher_folder, "auto").dtype == "float32"
    assert identity(teacher_folder, "bf16").dtype == "bfloat16"
    assert load(teacher_folder, attention="eager").config._attn_implementation == "eager"


def test_the_identity_depends_on_weights_and_settings_and_not_on_the_name(
    teacher_folder: Path, tmp_path: Path
) -> None:
    own = identity(teacher_folder)
    assert (own.name, own.dtype, own.family) == ("model", "float32", "llama")
    renamed, touched = tmp_path / "renamed", tmp_path / "touched"
    shutil.copytree(teacher_folder, renamed)
    assert identity(renamed).name == "renamed"
    assert identity(renamed).fingerprint == own.fingerprint
    configure(renamed, rms_norm_eps=1e-3)  # the same weights, another function
    assert identity(renamed).fingerprint != own.fingerprint
    model = load(teacher_folder)
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    model.save_pretrained(touched)
    assert identity(touched).fingerprint != own.fingerprint


def test_a_student_with_different_tokens_is_refused_by_the_first_difference(
    tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    assert vocabulary_size(tokenizer) == tokenizer_identity(tokenizer).size == VOCABULARY
    longer = load_tokenizer(str(tokenizer_folder), "s")
    expect_same_tokens(tokenizer, longer, "students.a")
    longer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert refused(lambda: expect_same_tokens(tokenizer, longer, "students.a")) == (
        "students.a: its tokenizer is not the teacher's: id 320 is '<extra>', the teacher's is "
        "None; a student must share the teacher's tokens"
    )
    shutil.copytree(tokenizer_folder, tmp_path / "swapped")
    path = tmp_path / "swapped" / "tokenizer.json"
    table = json.loads(path.read_text())
    tokens = {index: token for token, index in table["model"]["vocab"].items()}
    table["model"]["vocab"] |= {tokens[70]: 90, tokens[90]: 70}
    path.write_text(json.dumps(table))
    other = load_tokenizer(str(path.parent), "s")
    line = refused(lambda: expect_same_tokens(tokenizer, other, "students.a"))
    assert f"id 70 is {tokens[90]!r}, the teacher's is {tokens[70]!r}" in line


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_neox", "opt", "gptj", "codegen", "xglm",
     "lfm2", "qwen3_moe", "falcon", "gpt_neo"],
)  # fmt: skip
def test_a_new_model_has_the_requested_sizes(family: str, tied: bool, tokenizer: Any) -> None:
    sizes = ArchitectureConfig(
        family=family, layers=3, hidden=64, heads=4, feed_forward=80, context=84, tied=tied
    )
    model = build_model(sizes, tokenizer, 32, 0, "a.b")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head.shape == embedding.shape == (VOCABULARY, 64)
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert layer_count_of(model, 3) == 3
    assert feed_forward_widths(model) & {80, 160}
    assert max(feed_forward_widths(model)) <= 160
    assert context_length(model.config) == 84
    assert not model.training
    tokens = torch.arange(6)[None]
    assert model(input_ids=tokens, use_cache=False).logits.isfinite().all()


def test_the_seed_decides_the_weights_and_the_context_has_a_default(tokenizer: Any) -> None:
    sizes = ArchitectureConfig(family="gpt2", layers=1, hidden=32, heads=2)
    models = [build_model(sizes, tokenizer, 32, seed, "a") for seed in (0, 0, 1)]
    first, again, different = (next(model.parameters()) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, different)
    assert context_length(models[0].config) == 4 * 32


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"hidden": 33, "heads": 2}, "hidden = 33 is not a multiple of heads = 2"),
        ({"kv_heads": 3}, "heads = 4 is not a multiple of kv_heads = 3"),
        ({"family": "lama"}, "cannot make a 'lama' model: transformers has no causal"),
        ({"family": "t5"}, "cannot make a 't5' model: transformers has no causal"),
        ({"family": "gemma3"}, "cannot make a 'gemma3' model: it is made of several models, and"),
        ({"family": "mpt", "feed_forward": 96}, "feed_forward = 96: a 'mpt' model has feed_forwa"),
        ({"family": "bloom", "feed_forward": 96}, "feed_forward = 96: a 'bloom' model has feed_f"),
        ({"family": "bloom", "context": 77}, "context = 77: a 'bloom' model has no such size; "),
        ({"family": "mamba", "feed_forward": 96}, "feed_forward = 96: a 'mamba' model has no suc"),
        ({"family": "gpt2", "kv_heads": 1}, "kv_heads = 1: a 'gpt2' model has kv_heads = 4 here;"),
        ({"family": "bailing_hybrid"}, "tied = true: a 'bailing_hybrid' model has two matrices"),
    ],
)
def test_a_model_that_cannot_have_the_sizes_is_refused(
    sizes: dict[str, Any], line: str, tokenizer: Any
) -> None:
    config = ArchitectureConfig(**({"layers": 2, "hidden": 64, "heads": 4} | sizes))
    found = refused(lambda: build_model(config, tokenizer, 32, 0, "a.b"))
    assert found.startswith(f"a.b: {line}"), found
    assert "multiple" in found or "choose " in found


def test_a_family_without_attention_heads_is_noted() -> None:
    rwkv = ArchitectureConfig(family="rwkv", layers=1, hidden=32, heads=2)
    assert unused_heads(rwkv, "a") == (
        "a: heads = 2 has no effect: a 'rwkv' model has no attention heads"
    )
    assert unused_heads(ArchitectureConfig(layers=1, hidden=32, heads=2), "a") is None


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    missing, empty, bare = (tmp_path / name for name in ("missing", "empty", "bare"))
    assert refused(lambda: load_tokenizer(str(missing), "m")) == f"m: no folder {missing}"
    assert refused(lambda: load(missing)) == f"m: no folder {missing}"
    empty.mkdir()
    line = refused(lambda: load_tokenizer(str(empty), "m"))
    assert line.startswith(f"m: no tokenizer in {empty}")
    assert refused(lambda: load(empty)).startswith(f"m: cannot load {empty}: ")
    assert refused(lambda: identity(empty)).startswith("teacher.model: cannot load")
    make_model("llama", VOCABULARY).config.save_pretrained(bare)
    line = refused(lambda: identity(bare))
    assert line.endswith("bare holds no *.safetensors or *.bin weights")


@pytest.mark.parametrize(
    ("settings", "removed"),
    [
        ({"do_sample": False, "temperature": 0.7}, "left out: temperature = 0.7"),
        ({"do_sample": False, "top_p": 0.9, "top_k": 20}, "left out: top_p = 0.9, top_k = 20"),
        ({"num_beams": 1, "length_penalty": 2.0}, "left out: length_penalty = 2.0"),
        ({"pad_token_id": -1}, "left out: pad_token_id = -1"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_removed_and_noted(
    settings: dict[str, Any], removed: str, tmp_path: Path
) -> None:
    make_model("llama", VOCABULARY).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    model = load(tmp_path / "model")
    note = repair_generation(model)
    assert note is not None
    assert note.endswith(removed)
    model.generation_config.eos_token_id = 3  # a change makes transformers check strictly
    model.save_pretrained(tmp_path / "again")
    assert repair_generation(load(tmp_path / "again")) is None
