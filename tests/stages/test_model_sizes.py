"""Sizes told without making a model are those of the model."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.stages.config import ArchitectureConfig, LayersConfig, LoraConfig
from coldstill.stages.models.building import build_model
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import CHUNK_ELEMENTS as REAL_CHUNK_ELEMENTS
from coldstill.stages.planning.memory import CHUNK_ELEMENTS
from coldstill.stages.planning.model_sizes import (
    ModelSizes,
    adapter_parameters,
    sizes_of_layers,
    sizes_of_model,
    sizes_of_table,
)
from coldstill.stages.students.adapters import adapt
from coldstill.stages.students.pruning.layers import cut_to_layers
from conftest import FAMILIES, VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize(
    "more", [{}, {"tied": False, "kv_heads": 2}, {"feed_forward": 96}], ids=str
)
def test_a_table_is_counted_as_it_will_be_built(family: str, more: dict[str, Any]) -> None:
    if family in ("gpt2", "gpt_neox"):
        more = {key: value for key, value in more.items() if key != "kv_heads"}
    table = ArchitectureConfig(family=family, layers=3, hidden=64, heads=4, **more)
    tokens = {str(i): i for i in range(VOCABULARY)}
    nothing = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    tokenizer = SimpleNamespace(get_vocab=lambda: tokens, **nothing)
    model = build_model(table, tokenizer, 32, 0, "test")
    sizes = sizes_of_table(table, VOCABULARY, 32)
    assert sizes.parameters == model.num_parameters()
    config = model.config.get_text_config()
    assert sizes.hidden == config.hidden_size == 64
    assert sizes.layers == config.num_hidden_layers == 3
    assert sizes.vocabulary == VOCABULARY
    assert sizes.feed_forward == more.get("feed_forward", 192)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_saved_model_is_counted_from_its_headers(family: str, tmp_path: Path) -> None:
    model = make_model(family, VOCABULARY)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    sizes = sizes_of_model(str(tmp_path))
    assert sizes is not None
    assert sizes.parameters == model.num_parameters()
    assert (sizes.hidden, sizes.layers) == (32, 2)
    assert sizes.vocabulary == VOCABULARY
    assert sizes.dtype == "bfloat16"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_student_of_layers_is_counted_from_the_teachers_headers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], **deep})
    model = make_model(family, VOCABULARY)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    whole = sizes_of_model(str(tmp_path))
    assert whole is not None
    sizes = sizes_of_layers(whole, LayersConfig(keep=3), str(tmp_path))
    assert sizes is not None
    model = load_model(str(tmp_path), "test", precision="auto")
    student = cut_to_layers(model, [0, 2, 4], "test")
    assert sizes.parameters == student.num_parameters()
    assert (sizes.layers, sizes.dtype, sizes.hidden) == (3, "float32", 32)
    # layers that are not written down yet are taken to be alike, and the rest embeddings
    guess = sizes_of_layers(whole, LayersConfig(keep=3))
    assert guess is not None
    assert guess.parameters == pytest.approx(sizes.parameters, rel=0.05)
    assert sizes_of_layers(whole, LayersConfig(keep=6), str(tmp_path)) is None


def test_adapters_are_counted_as_they_will_be() -> None:
    model = make_model("llama", VOCABULARY)
    sizes = ModelSizes(
        parameters=model.num_parameters(), hidden=32, feed_forward=64, layers=2, vocabulary=320
    )
    adapt(model, LoraConfig(rank=4), 0, "test")
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_parameters(sizes, 4) == learned


@pytest.mark.parametrize(
    "spoil",
    ["config.json", "model.safetensors", None],
)
def test_what_cannot_be_told_is_unknown_not_an_error(
    tmp_path: Path, teacher_folder: Path, spoil: str | None
) -> None:
    if spoil is None:
        assert sizes_of_model(str(tmp_path / "nowhere")) is None
        assert sizes_of_model("ORG/NAME") is None
        return
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((teacher_folder / name).read_bytes())
    assert sizes_of_model(str(tmp_path)) is not None
    (tmp_path / spoil).write_bytes(b"[1, 2]")
    assert sizes_of_model(str(tmp_path)) is None


def test_a_model_in_a_table_of_its_own_is_found(tmp_path: Path, teacher_folder: Path) -> None:
    config = json.loads((teacher_folder / "config.json").read_text(encoding="utf-8"))
    plain = sizes_of_model(str(teacher_folder))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(
        (teacher_folder / "model.safetensors").read_bytes()
    )
    assert sizes_of_model(str(tmp_path)) == plain


def test_the_chunk_is_the_one_that_is_used() -> None:
    assert CHUNK_ELEMENTS == REAL_CHUNK_ELEMENTS
