"""Weights that are not those of the checkpoint are refused with their names and the cause."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import refused, renamed, save_checkpoint
from coldstill.stages.models.completeness import found_in
from coldstill.stages.models.loading import expect_loadable, load_model, load_state
from coldstill.stages.training.checkpoints import expect_own_tensors
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path


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
    line = refused(lambda: load_model(str(tmp_path / "a"), "m", precision="fp32"))
    assert refused(lambda: expect_loadable(str(tmp_path / "a"), "m")) == line
    assert "lm_head.weight and model.embed_tokens.weight are one tensor" in line
    assert "they differ" in line

    def equal(state: Any) -> Any:
        return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}

    save_checkpoint(tmp_path / "b", tokenizer, equal, tie_word_embeddings=True)
    assert expect_loadable(str(tmp_path / "b"), "m").is_whole
    model = load_model(str(tmp_path / "b"), "m", precision="fp32")
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
    line = refused(lambda: load_model(str(tmp_path), "m", precision="fp32"))
    assert line.startswith(f"m: {index} lists {len(set(listed.values()))} weight files, 1 of them")
    assert lost.name in line
    lost.write_bytes(weights)
    (tmp_path / "model-9.safetensors").write_bytes(weights)  # listed, with a tensor of another file
    index.write_text(json.dumps({"weight_map": {**listed, "ghost": "model-9.safetensors"}}))
    line = refused(lambda: expect_loadable(str(tmp_path), "m"))
    assert "another weight file holds the tensor" in line
