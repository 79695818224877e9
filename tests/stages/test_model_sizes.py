"""Sizes and memory estimated before a model is made or loaded equal those of the real model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig, LayersConfig, LoraConfig, TrainConfig
from coldstill.stages.models.building import build_model
from coldstill.stages.models.device import peak_memory
from coldstill.stages.planning.memory import capture_memory, training_memory
from coldstill.stages.planning.model_sizes import (
    ModelSizes,
    adapter_parameters,
    anatomy_of_model,
    model_folder,
    sizes_of_cuts,
    sizes_of_layers,
    sizes_of_model,
    sizes_of_table,
)
from coldstill.stages.students.adapters import adapt
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.cutting import cut, kept_parts
from coldstill.stages.students.pruning.layers import cut_to_layers
from coldstill.stages.students.pruning.shapes import target_sizes
from coldstill.stages.training.execution import running_blocks
from conftest import FAMILIES, VOCABULARY, make_model
from safetensors.torch import load_file, save_file
from small_pruning import anatomy, every_model, pruning_model, random_importance
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


WHERE = "students.small.prune"
TWICE = (PruneConfig(parameters="70%"), PruneConfig(parameters="45%", layers_by="loss"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3", "gpt_neox"])
def test_a_table_has_the_size_of_the_model_that_is_built_from_it(family: str) -> None:
    tokens = {str(i): i for i in range(VOCABULARY)}
    nothing = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    tokenizer = SimpleNamespace(get_vocab=lambda: tokens, **nothing)
    heads: dict[str, Any] = {} if family in ("gpt2", "gpt_neox") else {"kv_heads": 2}
    for more in ({}, {"tied": False, **heads}, {"feed_forward": 96}):
        table = ArchitectureConfig(family=family, layers=3, hidden=64, heads=4, **more)
        model = build_model(table, tokenizer, 32, 0, "test")
        sizes = sizes_of_table(table, VOCABULARY, 32)
        assert sizes.parameters == model.num_parameters()
        config = model.config.get_text_config()
        assert sizes.hidden == config.hidden_size == 64
        assert sizes.layers == config.num_hidden_layers == 3
        assert sizes.vocabulary == VOCABULARY
        assert sizes.feed_forward == more.get("feed_forward", 192)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_saved_model_and_a_student_of_its_layers_are_counted_from_headers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], **deep})
    model = make_model(family, VOCABULARY).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    whole = sizes_of_model(tmp_path)
    assert whole is not None
    assert whole.parameters == model.num_parameters()
    assert (whole.hidden, whole.layers, whole.vocabulary) == (32, 5, VOCABULARY)
    assert whole.dtype == "bfloat16"
    sizes = sizes_of_layers(whole, LayersConfig(keep=3), tmp_path)
    assert sizes is not None
    student = cut_to_layers(model, [0, 2, 4], "test")
    assert sizes.parameters == student.num_parameters()
    assert (sizes.layers, sizes.dtype, sizes.hidden) == (3, "float32", 32)
    # without files all layers count as equal and the rest as embeddings
    guess = sizes_of_layers(whole, LayersConfig(keep=3))
    assert guess is not None
    assert guess.parameters == pytest.approx(sizes.parameters, rel=0.05)
    assert sizes_of_layers(whole, LayersConfig(keep=6), tmp_path) is None


def test_adapters_are_counted_as_peft_makes_them() -> None:
    model = make_model("llama", VOCABULARY)
    sizes = ModelSizes(
        parameters=model.num_parameters(), hidden=32, feed_forward=64, layers=2, vocabulary=320
    )
    adapt(model, LoraConfig(rank=4), 0, "test")
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_parameters(sizes, 4) == learned


def test_a_missing_or_damaged_model_has_no_sizes(tmp_path: Path, teacher_folder: Path) -> None:
    assert model_folder(str(tmp_path / "nowhere")) is None
    assert model_folder("ORG/NAME") is None
    assert sizes_of_model(tmp_path) is None
    for damaged in ("config.json", "model.safetensors"):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(teacher_folder / name, tmp_path)
        assert sizes_of_model(tmp_path) is not None
        (tmp_path / damaged).write_bytes(b"[1, 2]")
        assert sizes_of_model(tmp_path) is None


def test_a_text_model_inside_another_configuration_is_found(
    tmp_path: Path, teacher_folder: Path
) -> None:
    config = json.loads((teacher_folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    shutil.copy(teacher_folder / "model.safetensors", tmp_path)
    assert sizes_of_model(tmp_path) == sizes_of_model(teacher_folder)


@pytest.mark.slow
@every_model
def test_cuts_are_counted_from_the_teacher_s_headers(name: str, tmp_path: Path) -> None:
    model = pruning_model(name)
    built = anatomy(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    whole, read = sizes_of_model(tmp_path), anatomy_of_model(tmp_path, WHERE)
    assert whole is not None
    assert read is not None
    assert (read.sizes, read.head_width) == (built.sizes, built.head_width)
    first, last = sizes_of_cuts(whole, read, TWICE, WHERE)
    target = target_sizes(built, TWICE[0], model.num_parameters(), WHERE)
    small = cut(model, built, kept_parts(built, target, random_importance(built.sizes)), WHERE)
    assert small.num_parameters() == built.parameters(target)
    assert anatomy(small) == built.resized(target)
    small.save_pretrained(tmp_path / "small")
    assert first == sizes_of_model(tmp_path / "small")
    assert 0.3 * whole.parameters < last.parameters <= 0.45 * whole.parameters


def test_the_anatomy_of_older_files_omits_the_first_name_part_and_masks(tmp_path: Path) -> None:
    model = pruning_model("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {key.removeprefix("transformer."): w for key, w in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in weights
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 128, 128)}, path)
    assert anatomy_of_model(tmp_path, WHERE) == anatomy(model)


def test_damaged_files_have_no_anatomy_and_an_unknown_family_is_refused(tmp_path: Path) -> None:
    assert anatomy_of_model(tmp_path / "nowhere", WHERE) is None
    pruning_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises(ColdstillError, match="cannot prune a 'bloom' model"):
        anatomy_of_model(tmp_path, WHERE)
    path.write_text("[]")
    assert anatomy_of_model(tmp_path, WHERE) is None
    (tmp_path / "model.safetensors").unlink()
    assert anatomy_of_model(tmp_path, WHERE) is None


V, T, ROWS = 512, 512, 4
SIZES = sizes_of_table(
    ArchitectureConfig(layers=4, hidden=256, heads=4, feed_forward=704), vocabulary=V,
    sequence_length=T,
)  # fmt: skip
CPU = torch.device("cpu")
NOT_TAKEN = 4 * SIZES.parameters + 2 * 4 * ROWS * T * V
"""Bytes of the weights, which exist before, and of the chunk of logits, which is not computed."""


def small_model() -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=704, max_position_embeddings=T, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def packed() -> dict[str, torch.Tensor]:
    """Two documents in each sequence: the mask between them takes memory too."""
    positions = torch.arange(T).expand(ROWS, T).clone()
    positions[:, T // 2 :] -= T // 2
    tokens = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "position_ids": positions}


def most_allocated(call: Callable[[], Any]) -> int:
    """Peak of the bytes that torch allocates within a call.

    So few bytes cannot be distinguished from what the C library keeps resident.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    found = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return int(max(itertools.accumulate(size for _, size in changes)))


def test_a_forward_pass_takes_about_the_estimated_memory() -> None:
    model = small_model()
    with torch.no_grad():
        taken = most_allocated(lambda: model.base_model(**packed(), use_cache=False))
    assert taken == pytest.approx(capture_memory(SIZES, "fp32", ROWS * T, T) - NOT_TAKEN, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_about_the_estimated_memory(checkpointing: bool) -> None:
    config = TrainConfig(steps=1, gradient_checkpointing=checkpointing)
    taken = []
    for _ in range(3):
        model = small_model()
        model.train()
        few = {name: value[:1, :64] for name, value in packed().items()}
        model.base_model(**few, use_cache=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with running_blocks(model, config, "test"), peak_memory(CPU) as memory:
            output = model.base_model(**packed(), use_cache=False)
            output.last_hidden_state.square().sum().backward()
            optimizer.step()
        taken.append(memory.bytes)
    rule = training_memory(SIZES, "fp32", ROWS * T, T, checkpointing=checkpointing)
    assert min(taken) == pytest.approx(rule - NOT_TAKEN, rel=0.35)


def test_weights_gradients_and_optimiser_state_are_counted_exactly() -> None:
    larger = dataclasses.replace(SIZES, parameters=SIZES.parameters + 1000)
    for precision, width in (("fp32", 4), ("bf16", 2), ("auto", 4)):
        few, many = (capture_memory(sizes, precision, 8192, T) for sizes in (SIZES, larger))
        assert many - few == 1000 * width
    half = dataclasses.replace(SIZES, dtype="bfloat16")
    assert capture_memory(half, "auto", 8192, T) == capture_memory(SIZES, "bf16", 8192, T)
    grown = training_memory(larger, "fp32", 8192, T) - training_memory(SIZES, "fp32", 8192, T)
    assert grown == 16 * 1000
    frozen = [training_memory(s, "fp32", 8192, T, frozen=True) for s in (larger, SIZES)]
    assert frozen[0] - frozen[1] == 4 * 1000
    adapted = training_memory(SIZES, "fp32", 8192, T, frozen=True, adapters=1000)
    assert adapted - frozen[1] == 16 * 1000


def test_a_batch_has_whole_sequences_and_a_chunk_limits_the_logits() -> None:
    assert capture_memory(SIZES, "fp32", 2 * T + 5, T) == capture_memory(SIZES, "fp32", 2 * T, T)
    assert training_memory(SIZES, "fp32", 1, T) == training_memory(SIZES, "fp32", T, T)
    assert training_memory(SIZES, "fp32", 2 * T, T) > training_memory(SIZES, "fp32", T, T)
    wide, narrow = (dataclasses.replace(SIZES, vocabulary=v) for v in (131_072, 65_536))
    assert capture_memory(wide, "fp32", 8192, T) == capture_memory(narrow, "fp32", 8192, T)
