"""Models and tokenizers: loading, building, identity, weight files, and refusals in one line."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import configure, refused, renamed, save_checkpoint
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.models.building import (
    build_model,
    feed_forward_widths,
    layer_count_of,
    unused_heads,
)
from coldstill.stages.models.completeness import found_in
from coldstill.stages.models.ends import repair_generation
from coldstill.stages.models.loading import (
    context_length,
    expect_loadable,
    load_config,
    load_model,
    load_state,
    load_tokenizer,
    teacher_identity,
)
from coldstill.stages.models.vocabulary import (
    expect_same_tokens,
    tokenizer_identity,
    vocabulary_size,
)
from coldstill.stages.planning.model_sizes import sizes_of_model
from coldstill.stages.training.checkpoints import expect_own_tensors
from conftest import FAMILIES, VOCABULARY, make_model
from safetensors.torch import save_file
from transformers import AutoConfig

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import TeacherIdentity


def identity(folder: Path, dtype: str = "fp32") -> TeacherIdentity:
    return teacher_identity(str(folder), "m", dtype=dtype, revision="main")


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


@pytest.mark.slow
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
    assert refused(lambda: identity(empty)).startswith("m: cannot load")
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


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_repeated_files_and_tied_tensors_count_once(
    shards: str, family: str, tmp_path: Path
) -> None:
    model = make_model(family, VOCABULARY)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    own, files = identity(tmp_path), list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "20KB")
    assert own.parameters == model.num_parameters()
    assert own.bytes == sum(path.stat().st_size for path in files)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "zz.safetensors"):
        shutil.copy(files[0], tmp_path / name)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin"):
        torch.save({"steps": [1, 2]}, tmp_path / name)
    assert identity(tmp_path) == own
    sizes = sizes_of_model(tmp_path)
    assert sizes is not None
    assert sizes.parameters == model.num_parameters()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_pickled_weights_are_read_in_both_formats(old: bool, family: str, tmp_path: Path) -> None:
    model = make_model(family, VOCABULARY)
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not old)
    torch.save({"steps": [1, 2]}, tmp_path / "training_args.bin")
    found = identity(tmp_path)
    assert found.parameters == model.num_parameters()
    assert found.bytes == path.stat().st_size
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    make_model("llama", VOCABULARY).config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": _Runs(f"touch {tmp_path}/ran")}, path)
    refused(lambda: load(tmp_path))
    assert "could run code" in refused(lambda: identity(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    assert refused(lambda: identity(tmp_path)).startswith(f"m: {path}: is not a table of tensors")


def test_a_pointer_of_git_lfs_and_half_a_file_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tokenizer) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    line = refused(lambda: identity(tmp_path))
    assert line.startswith(f"m: safetensors cannot read model.safetensors of {tmp_path} (damaged")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    line = refused(lambda: load(tmp_path))
    assert line.startswith(f"m: {path} is a pointer of Git LFS, not the weights;")


def test_weights_under_a_name_that_is_never_loaded_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, tokenizer) / "model.safetensors"
    path.rename(tmp_path / "consolidated.safetensors")
    line = refused(lambda: identity(tmp_path))
    assert "that transformers loads" in line
    assert "but consolidated.safetensors" in line


def test_an_adapter_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    settings = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(settings)
    save_file({"a": torch.zeros(1)}, alone / "adapter_model.safetensors")
    for call in (lambda: identity(alone), lambda: load_config(str(alone), "m")):
        assert refused(call).startswith(f"m: {alone} holds an adapter of 'org/base' and no model;")
    beside = save_checkpoint(tmp_path / "beside", tokenizer)
    (beside / "adapter_config.json").write_text(settings)
    line = refused(lambda: load(beside))
    assert "beside complete weights" in line


def without(part: str) -> Any:
    return renamed(lambda key: None if part in key else key)


def with_one_more(name: str, *shape: int) -> Any:
    return lambda state: {**state, name: torch.ones(shape)}


PREFIXED = "21 tensors missing (lm_head.weight, "
NO_HEAD = ["1 tensor missing (lm_head.weight)", "the head is neither in the file nor tied"]
WRONG: dict[str, tuple[Any, list[str]]] = {
    "compiled": (
        renamed(lambda key: f"_orig_mod.{key}"),
        [
            "21 tensors missing (lm_head.weight, model.embed_tokens.weight, ",
            "21 tensors unexpected (_orig_mod.lm_head.weight, ", "carry '_orig_mod.'",
            "torch.compile",
        ],
    ),
    "data parallel": (
        renamed(lambda key: f"module.{key}"),
        [PREFIXED, "carry 'module.'", "DistributedDataParallel"],
    ),
    "another prefix": (
        renamed(lambda key: f"student.model.{key}"),
        [PREFIXED, "21 tensors unexpected", "carry 'student.'"],
    ),
    "wrapped inside": (
        renamed(lambda key: key.replace("layers", "_fsdp_wrapped_module.layers")),
        ["18 tensors missing", "carry '_fsdp_wrapped_module.'", "FSDP"],
    ),
    "a lost layer": (without(".layers.1."), ["9 tensors missing", "the file lacks layer 1;"]),
    "a lost norm": (
        without("model.norm"), ["1 tensor missing (model.norm.weight)", "would be random numbers"],
    ),
    "no head": (without("lm_head"), NO_HEAD),
    "the base model": (
        renamed(lambda key: None if "lm_head" in key else key.removeprefix("model.")), NO_HEAD,
    ),
    "a classifier": (
        renamed(lambda key: "score.weight" if "lm_head" in key else key),
        [f"{NO_HEAD[0]}, 1 tensor unexpected (score.weight)", "the file is for another task"],
    ),
    "an added tensor": (
        with_one_more("v_head.summary.weight", 1, 32),
        ["1 tensor unexpected (v_head.summary.weight)", "they would be ignored"],
    ),
    "adapters": (
        with_one_more("model.layers.0.self_attn.q_proj.lora_A.default.weight", 2, 32),
        ["1 tensor unexpected", "adapters that were not merged"],
    ),
    "emptied": (
        lambda state: {key: torch.zeros(0) for key in state},
        ["21 tensors of another shape (lm_head.weight [0] in the file, [320, 32] by config.json"],
    ),
    "more layers": (
        {"num_hidden_layers": 1},
        ["9 tensors unexpected", "the file has layers up to 1, config.json asks for 1"],
    ),
    "another vocabulary": (
        {"vocab_size": VOCABULARY + 7},
        ["2 tensors of another shape (lm_head.weight [320, 32] in the file, [327, 32] by config"],
    ),
}  # fmt: skip
"""A change of the weights or of config.json, and parts of the error line."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused_alike_by_headers_and_by_loading(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    change, parts = WRONG[kind]
    settings = change if isinstance(change, dict) else {}
    change = dict if isinstance(change, dict) else change
    name = str(save_checkpoint(tmp_path, tokenizer, change, **settings))
    line = refused(lambda: expect_loadable(name, "a.b"))
    assert line.startswith(f"a.b: the weights in {name} are not those of a LlamaForCausalLM")
    assert [part for part in parts if part not in line] == []
    assert refused(lambda: load_model(name, "a.b", precision="fp32")) == line


@pytest.mark.parametrize(
    ("change", "family"),
    [
        (dict, "llama"),
        (dict, "gpt2"),
        (with_one_more("model.layers.0.self_attn.rotary_emb.inv_freq", 8), "llama"),
        (renamed(lambda key: key.removeprefix("model.")), "llama-tied"),
        (renamed(lambda key: f"model.{key}"), "llama"),
    ],
)
def test_tensors_that_transformers_derives_or_renames_are_accepted(
    change: Any, family: str, tokenizer: Any, tmp_path: Path
) -> None:
    name = str(save_checkpoint(tmp_path, tokenizer, change, family))
    assert expect_loadable(name, "a").is_whole
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours = load_model(name, "a", precision="fp32")(input_ids=tokens).logits
        assert torch.equal(ours, make_model(family, VOCABULARY)(input_ids=tokens).logits)


def test_tied_tensors_that_differ_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", tokenizer, tie_word_embeddings=True)
    line = refused(lambda: load(tmp_path / "a"))
    assert refused(lambda: expect_loadable(str(tmp_path / "a"), "m")) == line
    assert "lm_head.weight and model.embed_tokens.weight are one tensor" in line
    assert "they differ" in line

    def equal(state: Any) -> Any:
        return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}

    save_checkpoint(tmp_path / "b", tokenizer, equal, tie_word_embeddings=True)
    assert expect_loadable(str(tmp_path / "b"), "m").is_whole
    model = load(tmp_path / "b")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_are_not_finite_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def spoil(state: Any) -> Any:
        state["model.norm.weight"][2:4] = torch.tensor([float("nan"), 1e6])
        return state

    name = str(save_checkpoint(tmp_path, tokenizer, spoil))
    line = refused(lambda: load_model(name, "m", precision="fp32"))
    assert "model.norm.weight holds 1 value that is NaN or infinite in float32" in line
    line = refused(lambda: load_model(name, "m", precision="fp16"))  # 1e6 is infinite there
    assert "model.norm.weight holds 2 values" in line


def test_a_model_built_from_a_state_has_all_its_tensors() -> None:
    model = make_model("llama", VOCABULARY)
    state = model.state_dict()
    again = load_state(type(model), model.config, state, dtype=torch.float32)
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 tensor missing \(model.norm.weight\)"):
        load_state(type(model), model.config, state, dtype=torch.float32)


def test_image_tensors_are_ignored_if_only_the_text_model_is_loaded() -> None:
    model = make_model("llama", VOCABULARY)
    unexpected = {"vision_model.layer.0.weight", "multi_modal_projector.bias", "odd.weight"}
    info = {"missing_keys": set(), "unexpected_keys": unexpected, "mismatched_keys": set()}
    found = found_in(model, info, of_text_alone=True)
    assert (found.other_parts, found.unexpected) == (2, ("odd.weight",))
    assert found_in(model, info).unexpected == tuple(sorted(unexpected))


def test_a_training_checkpoint_must_have_all_tensors() -> None:
    model = make_model("llama-tied", VOCABULARY)
    expect_own_tensors(model, ["lm_head.weight"], [], "s")  # tied to the embedding, which is there
    line = refused(lambda: expect_own_tensors(model, ["model.norm.weight"], [], "s"))
    assert line.startswith("s: its last checkpoint lacks 1 tensor (model.norm.weight); delete it")
    line = refused(lambda: expect_own_tensors(model, [], ["_orig_mod.a"], "s"))
    assert "has 1 unknown tensor (_orig_mod.a)" in line
    model._keys_to_ignore_on_save = {"model.norm.weight"}  # frozen, so never saved
    expect_own_tensors(model, ["model.norm.weight"], [], "s")


def test_a_broken_index_is_named(tokenizer: Any, tmp_path: Path) -> None:
    make_model("llama", VOCABULARY).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    lost = tmp_path / listed["model.norm.weight"]
    weights = lost.read_bytes()
    lost.unlink()
    line = refused(lambda: load(tmp_path))
    assert line.startswith(f"m: {index} lists {len(set(listed.values()))} weight files, 1 of them")
    assert lost.name in line
    lost.write_bytes(weights)
    (tmp_path / "model-9.safetensors").write_bytes(weights)  # listed, with a tensor of another file
    index.write_text(json.dumps({"weight_map": {**listed, "ghost": "model-9.safetensors"}}))
    line = refused(lambda: expect_loadable(str(tmp_path), "m"))
    assert "another weight file holds the tensor" in line


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "mistral", "gpt2"])
def test_a_family_does_not_change_the_tokens_of_a_saved_tokenizer(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    """AutoTokenizer would split the text of a qwen2 model by the rule of Qwen 2."""
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    text = "In 1984 it's 10,000\n\n  x"
    assert load_tokenizer(str(tmp_path), "test")(text) == tokenizer(text)
